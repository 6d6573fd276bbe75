"""Signs that training is failing: loss spikes, collapse, zero weights, an edited configuration."""
