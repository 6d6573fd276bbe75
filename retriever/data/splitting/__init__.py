"""Division of pairs into a training, a dev and a test set."""
