"""The losses of a batch whose rows lie on the ranks of a process group."""
