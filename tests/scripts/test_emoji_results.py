"""The committed figures of the emoji run stand clearly above chance, every one."""

from __future__ import annotations

import csv
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent.parent / "scripts" / "results"


def test_every_figure_is_far_from_chance() -> None:
    with (RESULTS / "emoji.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["set"] for row in rows} >= {"held-out", "held-out-subgroups", "transfer", "held-out-transfer"}
    for row in rows:
        value, chance = float(row["value"]), float(row["chance"])
        better, worse = (chance, value) if row["measure"].endswith("rank") else (value, chance)
        assert better > 2 * worse, row
    assert int(rows[0]["processor_seconds"]) < 2 * 600
