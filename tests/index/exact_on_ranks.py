"""Exact search by several processes: `exact_on_ranks.py FOLDER DEVICE NUMBER …` forks each NUMBER of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from forks import environment, on_ranks
from torch import distributed

from index.exact import search as exact
from index.files import InputError

BLOCKS = (7, 100, 16384)


def check_ranks(rng: np.random.Generator, folder: Path, numbers: Sequence[int], device: str) -> None:
    """Each number of processes gives the bytes of a single process on a CPU, with any block size."""
    passages = rng.standard_normal((500, 16)).astype(np.float32)
    passages[250:] = passages[:250]  # every score twice, for ties across shards
    queries = rng.standard_normal((11, 16)).astype(np.float32)
    ids = [f"d{n}" for n in rng.permutation(500)]
    np.savez(folder / "data.npz", queries=queries, passages=passages, ids=np.array(ids))
    scores, rows = exact.search(queries, [(0, passages)], ids, 40)
    words = [sys.executable, __file__, str(folder), device, *map(str, numbers)]
    done = subprocess.run(words, env=environment(), stderr=subprocess.PIPE, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for ranks in numbers:
        for number in range(ranks):
            found = np.load(folder / f"{ranks}-{number}.npz")
            for block_rows in BLOCKS:
                assert found[f"scores{block_rows}"].tobytes() == scores.tobytes()
                assert found[f"rows{block_rows}"].tobytes() == rows.tobytes()
            # The last of 8 shards belongs to the last rank; the others must not wait for it.
            expected = "InputError: row 499" if number == ranks - 1 else "RuntimeError: exact search: another rank"
            assert str(found["error"]).startswith(expected)
            other = f"on rank {ranks - 1}"
            if ranks > 1:
                assert str(found["k"]) == f"k differs between ranks: 40 on rank 0, 41 {other}"
                assert str(found["queries"]) == f"the number of queries differs between ranks: 11 on rank 0, 10 {other}"
            else:
                assert "k" not in found and "queries" not in found


def search(folder: Path, device: str) -> None:
    """One rank: three block sizes, then a corpus with a NaN in its last shard."""
    rank, ranks = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=60))
    data = np.load(folder / "data.npz")
    queries, passages, ids = data["queries"], data["passages"], data["ids"].tolist()
    shards = [(start, passages[start : start + 64]) for start in range(0, len(passages), 64)]
    found = {}
    for block_rows in BLOCKS:
        scores, rows = exact.search_on_ranks(queries, shards, ids, 40, block_rows=block_rows, device=device)
        found |= {f"scores{block_rows}": scores, f"rows{block_rows}": rows}
    passages[-1, 0] = np.nan
    try:
        exact.search_on_ranks(queries, shards, ids, 40, device=device)
    except (InputError, RuntimeError) as error:
        found["error"] = np.array(f"{type(error).__name__}: {error}")
    for name, k, some in (
        ("k", 40 + (rank == ranks - 1), queries),
        ("queries", 40, queries[: 11 - (rank == ranks - 1)]),
    ):
        try:
            exact.search_on_ranks(some, shards[:-1], ids[:448], k, device=device)
        except ValueError as error:
            found[name] = np.array(str(error))
    np.savez(folder / f"{ranks}-{rank}.npz", **found)
    distributed.destroy_process_group()


if __name__ == "__main__":
    for number in sys.argv[3:]:
        on_ranks(int(number), partial(search, Path(sys.argv[1]), sys.argv[2]))
