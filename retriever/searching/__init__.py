"""Search with a model and an index, and mining of hard negatives."""
