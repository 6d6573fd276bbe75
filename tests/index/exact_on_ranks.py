"""Search by several processes. Runs as `exact_on_ranks.py RANK RANKS STORE FOLDER DEVICE`: one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import distributed

from index import exact
from index.files import InputError

HOUSE = Path(__file__).resolve().parents[2]
BLOCKS = (7, 100, 16384)


def check_ranks(rng: np.random.Generator, folder: Path, numbers: Sequence[int], device: str) -> None:
    """So many processes find the bytes that one alone finds on a processor, with any block size."""
    passages = rng.standard_normal((500, 16)).astype(np.float32)
    passages[250:] = passages[:250]  # every score twice, for ties across shards
    queries = rng.standard_normal((11, 16)).astype(np.float32)
    ids = [f"d{n}" for n in rng.permutation(500)]
    np.savez(folder / "data.npz", queries=queries, passages=passages, ids=np.array(ids))
    scores, rows = exact.search(queries, [(0, passages)], ids, 40)
    for ranks in numbers:
        for number, found in enumerate(_found_by(ranks, folder, device)):
            for block_rows in BLOCKS:
                assert found[f"scores{block_rows}"].tobytes() == scores.tobytes()
                assert found[f"rows{block_rows}"].tobytes() == rows.tobytes()
            # The last of 8 shards is the last rank's; nobody waits for it.
            expected = "InputError: row 499" if number == ranks - 1 else "RuntimeError: exact search: another rank"
            assert str(found["error"]).startswith(expected)


def _found_by(ranks: int, folder: Path, device: str) -> list[dict[str, np.ndarray]]:
    """What each of so many processes found."""
    environment = {**os.environ, "PYTHONPATH": str(HOUSE), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(ranks), folder / f"store{ranks}", folder, device],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
    return [dict(np.load(folder / f"{ranks}-{rank}.npz")) for rank in range(ranks)]


def main(rank: int, ranks: int, store: str, folder: Path, device: str) -> None:
    """Search with three block sizes, then in a corpus with a NaN in its last shard."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    files = {"init_method": f"file://{store}", "timeout": timedelta(seconds=60)}
    distributed.init_process_group(backend, rank=rank, world_size=ranks, **files)
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
    np.savez(folder / f"{ranks}-{rank}.npz", **found)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5])
