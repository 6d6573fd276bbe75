"""Search, and mining of hard negatives."""
