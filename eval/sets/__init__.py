"""The datasets of an evaluation: definitions, download, validation, and estimates of their cost."""
