"""Embeddings on disk: shards, their manifest, and reading and writing them."""
