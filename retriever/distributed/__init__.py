"""Distributed training, encoding and evaluation: ranks, collectives, errors and checks that ranks agree."""
