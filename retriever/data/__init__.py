"""Training data: sources, memory-mapped examples, the order of batches, and the batches themselves."""
