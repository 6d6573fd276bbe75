"""Devices, worker processes, progress and signals: helpers without a model."""
