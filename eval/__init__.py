"""Retrieval evaluation: BEIR sets, trec_eval metrics, run files, BM25, fusion, significance tests and reports."""
