"""The HTTP search service: one thread runs the model and the index, and concurrent queries are batched."""
