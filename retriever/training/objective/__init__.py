"""The loss of a training run and what it is computed from."""
