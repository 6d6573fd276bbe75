"""Paths that scripts share. A script puts the root of the checkout on sys.path and imports by full path."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results"
DATA = ROOT / "scripts" / "datasets" / "data"
