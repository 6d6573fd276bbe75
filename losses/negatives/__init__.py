"""InfoNCE from sums over negatives alone, with the positives as a list of pairs; in one process or over ranks."""
