"""Exact nearest-neighbor search by inner product."""
