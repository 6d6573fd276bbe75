"""A file hashed while it is written has the right content and checksum."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from index.files.checksums import BUFFER_BYTES, HashingFile


def test_writes_of_any_length_are_hashed(tmp_path: Path, rng: np.random.Generator) -> None:
    lengths = [
        0,
        1,
        7,
        BUFFER_BYTES - 1,
        3,
        BUFFER_BYTES,
        BUFFER_BYTES + 5,
        1,
        BUFFER_BYTES // 2,
        BUFFER_BYTES // 2 + 1,
        *[4] * 1000,
        3 * BUFFER_BYTES,
    ]
    pieces = [rng.bytes(length) for length in lengths]
    with HashingFile(tmp_path / "file") as file:
        assert [file.write(piece) for piece in pieces] == lengths
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert file.sha256 == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_an_empty_file_is_hashed(tmp_path: Path) -> None:
    with HashingFile(tmp_path / "file") as file:
        pass
    assert (tmp_path / "file").read_bytes() == b"" and file.sha256 == hashlib.sha256().hexdigest()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("length", [3, 3 * BUFFER_BYTES])
def test_a_full_disk_is_reported(length: int) -> None:
    with pytest.raises(OSError, match="No space left"), HashingFile(Path("/dev/full")) as file:
        file.write(b"x" * length)
