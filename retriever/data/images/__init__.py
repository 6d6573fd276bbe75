"""Pairs of an image and its captions: sources, decoding workers and batches."""
