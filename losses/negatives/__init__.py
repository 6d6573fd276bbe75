"""Negatives outside the pool: further terms of the row sums, and the autograd functions that compute them."""
