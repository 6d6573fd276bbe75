"""Signs of training that goes wrong: loss spikes, collapse, zero weights, an edited configuration."""
