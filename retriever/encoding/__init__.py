"""Texts, corpora and images to embeddings."""
