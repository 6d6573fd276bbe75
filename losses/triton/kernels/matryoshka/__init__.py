"""Kernels of the option `matryoshka`: scores of all prefixes of the embeddings from one product."""
