"""A writer that is killed at any moment is resumed to the same bytes."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from index_helpers import listing

from index.ann.build import build
from index.files import InputError
from index.store.reader import EmbeddingStore
from index.verify import verify

PRELUDE = """
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    from index.store.reader import EmbeddingStore
    from index.store.writer import EmbeddingWriter
    from index.passages import Passage

    folder, stop_before = Path(sys.argv[1]), int(sys.argv[2])
    calls = 0

    def counted(act):
        # Dies just before the given one of all the steps that change the disk.
        def step(*args, **kwargs):
            global calls
            calls += 1
            if calls == stop_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*args, **kwargs)
        return step

    os.replace, os.rename, os.fsync = counted(os.replace), counted(os.rename), counted(os.fsync)
"""
ENCODE = textwrap.dedent(PRELUDE) + textwrap.dedent("""
    header = {"dim": 4, "model": {"sha256": "ab"}, "source": {}, "shard_rows": 16}
    with EmbeddingWriter(folder, **header) as writer:
        print("started", flush=True)
        for row in range(writer.rows, 90):
            vector = np.random.default_rng(row).standard_normal((1, 4))
            writer.append([Passage(f"d{row}", "", f"text {row}")], vector)
    print(calls)
""")
BUILD = textwrap.dedent(PRELUDE) + textwrap.dedent("""
    from index.ann.build import build

    build(EmbeddingStore.open(Path(sys.argv[3])), folder, factory=sys.argv[4])
    print(calls)
""")


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def encode(folder: Path, stop_before: int = 0) -> subprocess.CompletedProcess:
    return run(ENCODE, folder, stop_before)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict[str, bytes], int]:
    """The files of an uninterrupted run, and its number of disk operations."""
    folder = tmp_path_factory.mktemp("undisturbed") / "emb"
    done = encode(folder)
    assert done.returncode == 0, done.stderr
    return listing(folder), int(done.stdout.split()[-1])


@pytest.mark.parametrize("share", [0.0, 0.02, 0.13, 0.3, 0.31, 0.32, 0.33, 0.7, 0.98, 1.0])
def test_a_writer_killed_before_any_step_resumes_to_the_same_bytes(tmp_path: Path, undisturbed, share: float) -> None:
    whole, steps = undisturbed
    folder = tmp_path / "emb"
    # The last two steps only flush the folder after the last rename: the store is already complete.
    killed = encode(folder, stop_before=1 + round(share * (steps - 3)))
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(InputError, match=r"incomplete|found no manifest\.json"):
        EmbeddingStore.open(folder)
    again = encode(folder)
    assert again.returncode == 0, again.stderr
    assert listing(folder) == whole


def test_a_writer_killed_repeatedly_resumes_to_the_same_bytes(tmp_path: Path, undisturbed) -> None:
    whole = undisturbed[0]
    folder = tmp_path / "emb"
    for kill in range(4):
        process = subprocess.Popen([sys.executable, "-c", ENCODE, str(folder), "0"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.004 * kill)
        process.kill()
        process.wait()
        process.stdout.close()
    again = encode(folder)
    assert again.returncode == 0, again.stderr
    assert verify(folder).rows == 90
    assert listing(folder) == whole


def test_a_killed_build_leaves_a_complete_index_or_none(tmp_path: Path) -> None:
    assert encode(tmp_path / "emb").returncode == 0
    store, out = EmbeddingStore.open(tmp_path / "emb"), tmp_path / "index"
    build(store, out, factory="SQ8")
    old = listing(out)
    done = run(BUILD, out, 0, store.folder, "Flat")
    assert done.returncode == 0, done.stderr
    new, steps = listing(out), int(done.stdout.split()[-1])
    build(store, out, factory="SQ8")
    # In reverse: flush the parent folder, rename the new folder, rename the old one, flush a file.
    for step in range(steps, steps - 4, -1):
        assert run(BUILD, out, step, store.folder, "Flat").returncode == -signal.SIGKILL
        if step == steps - 1:  # between the two renames
            assert not out.exists()
        else:
            assert listing(out) == (new if step == steps else old)
        build(store, out, factory="Flat")
        assert listing(out) == new
        build(store, out, factory="SQ8")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["emb", "index"]
