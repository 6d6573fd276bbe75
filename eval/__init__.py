"""Retrieval evaluation: BEIR folders, trec_eval metrics, run files, baselines and reports."""
