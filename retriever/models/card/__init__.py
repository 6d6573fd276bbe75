"""Model cards: the README.md of a model folder, with the metadata of the Hugging Face Hub."""
