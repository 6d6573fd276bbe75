"""The option `matryoshka` on one GPU: packed operands, and launches of the kernels in triton/kernels/matryoshka."""
