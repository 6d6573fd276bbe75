"""BEIR folders: queries, qrels and corpus."""

from index.beir.dataset import BeirDataset, beir_file, is_beir_folder, parse_query, read_queries
from index.beir.qrels import (
    NUMBER,
    PASSAGE,
    PASSAGE_HEADS,
    QUERY,
    Judgements,
    Qrels,
    first_locations,
    head_names,
    is_header,
    judgement_lines,
    read_qrels,
)

__all__ = [
    "NUMBER",
    "PASSAGE",
    "PASSAGE_HEADS",
    "QUERY",
    "BeirDataset",
    "Judgements",
    "Qrels",
    "beir_file",
    "first_locations",
    "head_names",
    "is_beir_folder",
    "is_header",
    "judgement_lines",
    "parse_query",
    "read_qrels",
    "read_queries",
]
