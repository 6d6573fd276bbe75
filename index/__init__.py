"""Passages, embeddings and indexes on disk, and the search over them."""
