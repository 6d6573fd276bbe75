"""Several processes that train, encode or evaluate together (torchrun)."""
