"""Building takes the memory of the index and a piece of a shard, for stores of any size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from index_helpers import passages_of

from index.ann.factory import memory
from index.store.writer import EmbeddingWriter

ROWS, DIM = 60_000, 256
MIB = 2**20
# Peak of anonymous memory, which excludes the mapped files of the store.
BUILD = """
import sys, threading, time
from pathlib import Path
import faiss
from index.ann.build import Plan, build
from index.store.reader import EmbeddingStore

def held():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

before, peak, ended = held(), 0, threading.Event()

def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, held())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
budget = float(sys.argv[4]) or None
plan = Plan(sys.argv[3], on_disk=bool(budget), memory_mib=budget)
if sys.argv[5:]:
    plan = Plan(part=(1, 10), train_from=Path(sys.argv[5]))
build(EmbeddingStore.open(Path(sys.argv[1])), Path(sys.argv[2]), plan)
ended.set()
watcher.join()
print(peak - before)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """59 MiB of vectors in shards of 6 MiB."""
    folder = tmp_path_factory.mktemp("memory") / "emb"
    rng = np.random.default_rng(0)
    with EmbeddingWriter(folder, dim=DIM, model={"sha256": "ab"}, source={}, shard_rows=6000) as writer:
        for row in range(0, ROWS, 6000):
            ids = [f"d{number}" for number in range(row, row + 6000)]
            writer.append(passages_of(ids), rng.standard_normal((6000, DIM), np.float32))
    return folder


def peak(store: Path, out: Path, factory: str, budget: float = 0, train_from: Path | None = None) -> float:
    words = [sys.executable, "-c", BUILD, str(store), str(out), factory, str(budget)]
    words += [str(train_from)] if train_from else []
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize(("factory", "copies"), [("Flat", 1), ("SQfp16", 1), ("IVF64,SQ8", 1.5)])
def test_build_memory_is_the_index_and_a_piece_of_a_shard(
    tmp_path: Path, store: Path, factory: str, copies: float
) -> None:
    """Inverted lists grow by doubling, so that up to half of their memory is unused."""
    sample = 2 * 16384 * DIM * 4 if "SQ8" in factory else 0  # faiss copies what it trains on, and this is before
    shard = 6000 * DIM * 4
    limit = max(sample, copies * memory(factory, ROWS, DIM)) + 2 * shard + 8 * MIB
    assert peak(store, tmp_path / "index", factory) < limit
    assert factory == "Flat" or limit < ROWS * DIM * 4


def test_on_disk_build_takes_less_memory_than_the_lists(tmp_path: Path, store: Path) -> None:
    assert peak(store, tmp_path / "index", "IVF16,Flat", budget=10) < memory("IVF16,Flat", ROWS, DIM) * 0.7


@pytest.mark.parametrize("on_disk", [True, False])
def test_train_from_does_not_load_the_vectors(tmp_path: Path, store: Path, on_disk: bool) -> None:
    peak(store, tmp_path / "whole", "IVF16,Flat", budget=100 if on_disk else 0)
    tenth = memory("IVF16,Flat", ROWS // 10, DIM)
    assert peak(store, tmp_path / "tenth", "", train_from=tmp_path / "whole") < 4 * tenth + 8 * MIB
