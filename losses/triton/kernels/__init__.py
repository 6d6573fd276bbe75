"""Triton kernels of the losses: tiles of scores, their sums, their gradients. They are tested under Triton's
interpreter on a CPU and on the GPU."""
