"""Evaluation on a GPU is bitwise equal to the CPU. Needs only torch, numpy and pytest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eval.evaluate import evaluate_beir, exact_search, ranked_run
from index.beir import BeirDataset
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter

pytestmark = pytest.mark.gpu
PASSAGES, QUERIES, DIM = 20_011, 101, 96


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_runs_and_metrics_equal_the_cpu(tmp_path: Path, dtype: str) -> None:
    generator = np.random.default_rng(0)
    corpus = generator.standard_normal((PASSAGES, DIM), dtype=np.float32)
    corpus[15_000:] = corpus[:5011]  # ties, broken by id
    queries = corpus[:QUERIES] + generator.standard_normal((QUERIES, DIM), dtype=np.float32)
    (tmp_path / "qrels").mkdir()
    rows = [json.dumps({"_id": f"d{n}", "text": f"text {n}"}) for n in range(PASSAGES)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))
    # The first query has the id of a passage and must get k other passages.
    asked = ["d0", *(f"q{n}" for n in range(1, QUERIES))]
    (tmp_path / "queries.jsonl").write_text("\n".join(json.dumps({"_id": one, "text": "a"}) for one in asked))
    (tmp_path / "qrels" / "test.tsv").write_text("".join(f"{one}\td{n + 1}\t1\n" for n, one in enumerate(asked)))
    dataset = BeirDataset.open(tmp_path)
    with EmbeddingWriter(
        tmp_path / "store", dim=DIM, model={"m": "m"}, source={}, dtype=dtype, shard_rows=7000
    ) as writer:
        writer.append(list(dataset.passages()), corpus)
    store = EmbeddingStore.open(tmp_path / "store")
    whole, found = (
        evaluate_beir(dataset, store=store, embed_queries=lambda texts: queries, k=100, device=device)
        for device in ("cpu", "cuda")
    )
    assert whole[1].mean == found[1].mean and "d0" not in found[0]["d0"]
    ids = store.ids()
    runs = [whole[0], found[0]]
    for block_rows in (1000, 4099):
        find = exact_search(store, ids, device="cuda", block_rows=block_rows)
        runs.append(ranked_run(dataset, ids, find, lambda: queries, 100))
    assert len({(run.rows.tobytes(), run.scores.tobytes()) for run in runs}) == 1
