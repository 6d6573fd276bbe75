"""Processes that write, merge or change an index are killed at random moments. No incomplete result is accepted.

KILLS is the total number of kills; the default keeps the test run short.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from index_helpers import listing, passages_of

from index.ann.build import Plan, build
from index.ann.edit import add_passages, delete_passages, retune
from index.ann.layout import CURVE_FILE
from index.ann.merge import merge
from index.ann.tuning.recall import Target
from index.files import InputError, recover_folder
from index.manifest import NAME
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from index.verify import verify

KILLS = int(os.environ.get("KILLS", "16"))
ROWS = 12_000
WORKS = ("write", "build", "build on disk", "merge", "merge on disk", "add", "delete", "tune")

# Import once and fork for every run: otherwise most kills would hit the imports.
SPAWN = multiprocessing.get_context("forkserver")
DRAWING = ["scipy.stats", "matplotlib.figure", "matplotlib.backends.backend_agg"]
SPAWN.set_forkserver_preload(
    ["faiss", "index.ann.build", "index.ann.edit", "index.ann.merge", "index.store.reader", *DRAWING]
)


def write_store(folder: Path, first: int, last: int) -> None:
    """Write rows `first` to `last` of vectors that are always the same."""
    with EmbeddingWriter(folder, dim=16, model={"sha256": "ab"}, source={}, shard_rows=1000) as writer:
        for row in range(first + writer.rows, last, 250):
            vectors = np.random.default_rng(row).standard_normal((250, 16), np.float32)
            writer.append(passages_of([f"d{number}" for number in range(row, row + 250)]), vectors)


def work(what: str, made: Path, out: Path, started: object = None) -> None:
    """Run the command `what` on the stores and indexes in `made`; write to `out`."""
    if started is not None:
        started.set()  # type: ignore[attr-defined]
    store = made / "store"
    if what == "write":
        write_store(out, 0, ROWS)
    elif what.startswith("build"):
        build(EmbeddingStore.open(store), out, Plan("IVF64,SQ8", on_disk=what == "build on disk", memory_mib=0.05))
    elif what == "merge":
        merge([made / "part1", made / "part2"], out)
    elif what == "merge on disk":
        merge([made / "part1 on disk", made / "part2"], out, on_disk=True)
    elif what == "add":
        add_passages(out, EmbeddingStore.open(made / "more"))
    elif what == "tune":
        retune(out, EmbeddingStore.open(store), Target(0.95, held_out=100))
    else:
        delete_passages(out, [f"d{row}" for row in range(0, ROWS, 3)])


def files(what: str, folder: Path) -> dict[str, bytes]:
    """The files that `what` leaves in `folder`; without the measured times of tuning."""
    timed = (NAME, CURVE_FILE) if what == "tune" else ()
    return {name: data for name, data in listing(folder).items() if name not in timed}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_store(folder / "store", 0, ROWS)
    write_store(folder / "more", ROWS, ROWS + 4000)
    store = EmbeddingStore.open(folder / "store")
    build(store, folder / "part1", Plan("IVF64,SQ8", part=(1, 2)))
    build(store, folder / "part2", Plan(part=(2, 2), train_from=folder / "part1"))
    build(store, folder / "part1 on disk", Plan(part=(1, 2), train_from=folder / "part1", on_disk=True))
    build(store, folder / "old", Plan("IVF64,Flat"))
    return folder


def run(what: str, made: Path, out: Path, kill_after: float | None = None) -> float:
    """Run `what` in another process and kill it after `kill_after` seconds; return how long it ran."""
    started = SPAWN.Event()
    process = SPAWN.Process(target=work, args=(what, made, out, started))
    process.start()
    started.wait(60)
    begun = time.perf_counter()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()
    process.join(120)
    if kill_after is None:
        assert process.exitcode == 0
    return time.perf_counter() - begun


@pytest.mark.parametrize("place", range(len(WORKS)), ids=WORKS)
def test_killed_at_random_moments(tmp_path: Path, made: Path, place: int, record: Callable) -> None:
    what, out = WORKS[place], tmp_path / "out"
    begins_with_old = what in ("add", "delete", "merge", "merge on disk", "tune")

    def begin() -> None:
        recover_folder(out)
        shutil.rmtree(out, ignore_errors=True)
        if begins_with_old:
            shutil.copytree(made / "old", out)

    begin()
    old = files(what, out) if begins_with_old else None
    seconds = run(what, made, out)
    whole = files(what, out)
    assert whole != old
    rng = np.random.default_rng(place)
    for _ in range(len(range(place, KILLS, len(WORKS)))):
        begin()
        run(what, made, out, kill_after=rng.uniform(0, seconds))
        try:
            verify(out)
            EmbeddingStore.open(out) if what == "write" else None
            state = "new" if files(what, out) == whole else "old"
            assert files(what, out) in (old, whole)
        except InputError as error:
            assert "incomplete" in str(error) or "found no manifest.json there" in str(error)
            state = "none"
        record(what, state)
        run(what, made, out)
        assert files(what, out) == whole
        assert os.listdir(tmp_path) == ["out"], "what the killed process left is gone"


@pytest.fixture(scope="module")
def record():
    """Count what the kills left; printed at the end (pytest -s)."""
    counts: dict[tuple[str, str], int] = {}

    def add(what: str, state: str) -> None:
        counts[what, state] = counts.get((what, state), 0) + 1

    yield add
    print("".join(f"\n{what}: {state} {count}" for (what, state), count in sorted(counts.items())))
