"""faiss on GPUs: building indexes, and searching them."""
