"""Evaluation of models on BEIR and zero-shot sets."""
