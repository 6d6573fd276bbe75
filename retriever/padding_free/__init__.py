"""Padding-free towers: the texts of a micro-batch laid end to end, each attending to itself alone."""
