"""Devices, worker processes, background threads, progress bars and signals."""
