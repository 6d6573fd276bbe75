"""Backends of the options `matryoshka` and `teacher`, and the choice among all backends."""
