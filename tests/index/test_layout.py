"""Writing ids and passages into an index folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from index.ann import layout
from index.files import InputError


@pytest.mark.parametrize("block", [1, 7, 2**24])
def test_write_passages_keeps_lines_and_offsets(tmp_path: Path, monkeypatch, rng, block: int) -> None:
    """Lines of any length, including empty ones, split anywhere between blocks."""
    monkeypatch.setattr(layout, "BLOCK_BYTES", block)
    lines = [b"x" * int(length) + "é\u2028".encode() * (length % 2) + b"\n" for length in rng.integers(0, 20, 60)]
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for path, some in zip(files, (lines[:25], [], lines[25:]), strict=True):
        path.write_bytes(b"".join(some))
    for keep in (None, rng.random(60) < 0.5, np.zeros(60, bool)):
        layout.write_passages(files, files, 60, tmp_path, keep)
        kept = [line for row, line in enumerate(lines) if keep is None or keep[row]]
        assert (tmp_path / layout.IDS_FILE).read_bytes() == b"".join(kept)
        assert (tmp_path / layout.PASSAGES_FILE).read_bytes() == b"".join(kept)
        starts = np.load(tmp_path / layout.OFFSETS_FILE)
        assert starts.tolist() == np.cumsum([0, *map(len, kept)])[:-1].tolist() and starts.dtype == np.uint64


@pytest.mark.parametrize(("text", "found"), [(b"a\nb\n", "found 2"), (b"a\nb\nc\nd\n", "more"), (b"a\nb\nc", "end")])
def test_a_wrong_number_of_lines_is_refused(tmp_path: Path, text: bytes, found: str) -> None:
    (tmp_path / "ids").write_bytes(text)
    with pytest.raises(InputError, match=rf"ids: expected .*found .*{found.removeprefix('found ')}"):
        layout.write_passages([tmp_path / "ids"], [tmp_path / "ids"], 3, tmp_path)
