"""Evaluation with passages in fewer bits: the same table as fewer dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import retriever


def test_lower_precisions_are_rows_of_the_table_of_sizes(world: Any, tmp_path: Path) -> None:
    found = retriever.evaluate(
        world.model, world.beir, out=tmp_path / "report", precisions=["int8", "binary", "binary+int8"]
    )
    sizes = {precision: (dim, size, sets) for dim, precision, size, sets in found.by_size}
    assert [(dim, size) for dim, size, _ in sizes.values()] == [(32, 128), (32, 32), (32, 4), (32, 36)]
    assert sizes["float32"][2]["words"].metrics == found.metrics and found.by_dim[32]["words"].metrics == found.metrics
    stored = retriever.evaluate(world.model, world.beir, out=tmp_path / "int8", dtype="int8")
    assert sizes["int8"][2]["words"].metrics == stored.metrics
    # 20 passages are all candidates: only int8 ranks them.
    assert sizes["binary+int8"][2]["words"].metrics["ndcg@10"] == stored.metrics["ndcg@10"]
    report = (tmp_path / "report" / "report.md").read_text()
    assert "binary+int8" in report and (tmp_path / "report" / "words" / "dim-32-binary.trec").exists()
