"""Triton kernels of the losses: scores of tiles, their sums and gradients.

Tests run them on a GPU and, under Triton's interpreter, on a CPU.
"""
