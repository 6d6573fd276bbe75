"""Training: the trainer, the optimizer step, the gradient cache, checkpoints and validation."""
