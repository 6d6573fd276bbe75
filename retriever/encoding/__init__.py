"""Encoding of texts, corpora and images."""
