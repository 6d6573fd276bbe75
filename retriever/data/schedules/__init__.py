"""The order of the training data: which rows a step has."""
