"""Models for others: pushing to the Hugging Face Hub, and export to other formats."""
