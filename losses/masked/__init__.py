"""InfoNCE from sums over negatives alone: several positives, masked and weighted negatives, statistics."""
