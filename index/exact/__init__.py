"""Exact nearest-neighbour search by inner product."""
