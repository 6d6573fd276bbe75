"""Evaluation of models on BEIR sets and zero-shot image sets."""
