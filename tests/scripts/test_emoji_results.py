"""The committed figures of the emoji run stand clearly above chance, every one, and took the time that it promises."""

from __future__ import annotations

import csv
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent.parent / "scripts" / "results"


def committed() -> list[dict[str, str]]:
    with (RESULTS / "emoji.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_figure_is_far_from_chance() -> None:
    rows = committed()
    assert {row["set"] for row in rows} >= {"held-out", "held-out-subgroups", "transfer", "held-out-transfer"}
    for row in rows:
        value, chance = float(row["value"]), float(row["chance"])
        better, worse = (chance, value) if row["measure"].endswith("rank") else (value, chance)
        assert better > 2 * worse, row


def test_the_run_took_less_than_ten_minutes_on_two_cores() -> None:
    for row in committed():
        assert row["hardware"].startswith("2 cores") and int(row["seconds"]) < 600
