"""The losses in tiles of the score matrix, in plain PyTorch on any device."""
