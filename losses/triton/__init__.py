"""The losses by Triton kernels on one GPU: launches, tile shapes, autograd."""
