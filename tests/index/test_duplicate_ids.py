"""Detection of duplicate ids: added ids are found, false positives are rare, and ids take no memory for their text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.store import duplicate_ids
from index.store.duplicate_ids import DuplicateFinder


@given(st.lists(st.lists(st.integers(0, 60), max_size=9), max_size=12))
def test_possible_duplicates_equal_those_of_a_set(pieces: list[list[int]]) -> None:
    ids, known = DuplicateFinder(Path()), set()
    for piece in pieces:
        texts = [str(number) for number in piece]
        assert ids.possible_duplicates(texts) == [n for n, text in enumerate(texts) if text in {*known, *texts[:n]}]
        ids.add(texts)
        known |= set(texts)


def test_long_runs_are_unnamed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicate_ids, "_IN_MEMORY_ROWS", 1000)
    ids = DuplicateFinder(tmp_path)
    for start in range(0, 20_000, 100):
        ids.add([str(number) for number in range(start, start + 100)])
    assert len(ids._runs) < 8 and not list(tmp_path.iterdir())
    assert all(isinstance(run, np.memmap) for run in ids._runs if len(run) > 1000)
    assert sum(len(run) for run in ids._runs if not isinstance(run, np.memmap)) <= 2000
    assert ids.possible_duplicates(["20000", "7", "x", "19999", "x"]) == [1, 3, 4]


def test_hash_collisions_are_not_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from index.files import InputError
    from index.passages import Passage
    from index.store.writer import EmbeddingWriter

    monkeypatch.setattr(duplicate_ids, "_hashes", lambda ids: np.zeros(len(ids), dtype=np.int64))
    with EmbeddingWriter(tmp_path / "store", dim=2, model={}, source={}, shard_rows=2) as writer:
        writer.append([Passage(str(n), "", "text") for n in range(5)], np.ones((5, 2)))
        with pytest.raises(InputError, match="found '1' in rows 1 and 6"):
            writer.append([Passage(name, "", "text") for name in ("5", "1")], np.ones((2, 2)))
