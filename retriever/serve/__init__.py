"""Search as a service: one thread owns model and index, concurrent queries share its batches, a page shows answers."""
