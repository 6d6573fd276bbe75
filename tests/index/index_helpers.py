from __future__ import annotations

import os
from pathlib import Path

from index.passages import Passage

MODEL = {"sha256": "ab" * 32}


def passages_of(ids: list[str]) -> list[Passage]:
    return [Passage(id_, f"title {id_}", f"text of {id_}\nsecond line \u2028 é") for id_ in ids]


def listing(folder: Path) -> dict[str, bytes]:
    """Every file of `folder` with its bytes."""
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}
