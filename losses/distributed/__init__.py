"""The losses over the ranks of a process group, each of which holds a shard of the batch."""
