"""Ids on disk behave like a list."""

from __future__ import annotations

from pathlib import Path

import pytest

from index.files import InputError
from index.store import ids
from index.store.ids import Ids, duplicate_id


def write(path: Path, names: list[str]) -> tuple[Path, int]:
    path.write_bytes("".join(f"{name}\n" for name in names).encode())
    return path, len(names)


@pytest.mark.parametrize("block", [3, 50, 2**22])
@pytest.mark.parametrize("counts", [(), (0,), (1,), (8,), (7, 0, 9, 40), (17, 64)])
def test_ids_read_like_a_list(tmp_path: Path, monkeypatch, block: int, counts: tuple[int, ...]) -> None:
    monkeypatch.setattr(ids, "BLOCK_BYTES", block)
    monkeypatch.setattr(ids, "MAX_MAPPED_FILES", 1)
    names = [f"d{row}{'é😀'[: row % 3]}\u2028"[: 2 + row % 4] for row in range(sum(counts))]
    firsts = [sum(counts[:n]) for n in range(len(counts))]
    files = [write(tmp_path / str(n), names[a : a + c]) for n, (a, c) in enumerate(zip(firsts, counts, strict=True))]
    read = Ids(files)
    assert len(read) == len(names) and list(read) == names
    assert [read[row] for row in range(-len(names), len(names))] == names + names
    for start in range(0, len(names) + 1, 5):
        assert read[start:] == names[start:] and read[: start + 3 : 2] == names[: start + 3 : 2]
        assert read[start : start + 21] == names[start : start + 21] and read[:start:-1] == names[:start:-1]
    for row in (len(names), -len(names) - 1):
        with pytest.raises(IndexError, match="ids"):
            read[row]


@pytest.mark.parametrize(
    ("text", "found"),
    [(b"a\nb\n", "expected 3 ids, one per line, found 2"), (b"a\nb\nc\nd\n", "found 4"), (b"a\nb\nc", "found 3")],
)
def test_a_wrong_number_of_ids_is_refused(tmp_path: Path, text: bytes, found: str) -> None:
    (tmp_path / "ids").write_bytes(text)
    with pytest.raises(InputError, match=found):
        Ids([(tmp_path / "ids", 3)])


@pytest.mark.parametrize("text", [b"a\n\xff\nb\n", b"a\nb\n\xe2"])
def test_ids_in_invalid_utf8_are_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "ids").write_bytes(text)
    with pytest.raises(InputError, match="ids: expected UTF-8"):
        Ids([(tmp_path / "ids", 3)])


def test_duplicate_ids_are_found_across_files(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", ["x", "y"])[0], write(tmp_path / "b", ["z", "x"])[0]
    assert duplicate_id([first, second]) == "x" and duplicate_id([first]) is None
