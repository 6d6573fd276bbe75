"""The losses by Triton kernels on one GPU: launches, shapes of tiles, autograd."""
