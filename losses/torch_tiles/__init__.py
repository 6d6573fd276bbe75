"""The losses in tiles of the score matrix, in PyTorch, on any device."""
