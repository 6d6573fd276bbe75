"""Training data of images and captions: sources, decoding workers and batches."""
