"""Choosing models: merging their weights, and studies over settings of a training run."""
