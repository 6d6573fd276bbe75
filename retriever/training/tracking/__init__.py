"""What a training run records: rows of metrics, trackers, and a plot."""
