"""One rank of a search by several processes: `exact_on_ranks.py RANK RANKS STORE FOLDER`; writes what it found."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
from torch import distributed

from index import exact
from index.files import InputError


def main(rank: int, ranks: int, store: str, folder: Path) -> None:
    """Search with three block sizes, then in a corpus with a NaN in its last shard."""
    files = {"init_method": f"file://{store}", "timeout": timedelta(seconds=60)}
    distributed.init_process_group("gloo", rank=rank, world_size=ranks, **files)
    data = np.load(folder / "data.npz")
    queries, passages, ids = data["queries"], data["passages"], data["ids"].tolist()
    shards = [(start, passages[start : start + 64]) for start in range(0, len(passages), 64)]
    found = {}
    for block_rows in (7, 100, 16384):
        scores, rows = exact.search_on_ranks(queries, shards, ids, 40, block_rows=block_rows)
        found |= {f"scores{block_rows}": scores, f"rows{block_rows}": rows}
    passages[-1, 0] = np.nan
    try:
        exact.search_on_ranks(queries, shards, ids, 40)
    except (InputError, RuntimeError) as error:
        found["error"] = np.array(f"{type(error).__name__}: {error}")
    np.savez(folder / f"{ranks}-{rank}.npz", **found)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
