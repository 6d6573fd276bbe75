"""Attention over packed sequences: the texts of a micro-batch are concatenated, without padding."""
