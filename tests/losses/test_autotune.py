"""`python -m losses.autotune` writes the quickest shape that fits, of each case it was asked for."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from losses import autotune
from losses.triton.shapes import read_shapes


def pretended_milliseconds(trial: autotune.Trial, folder: Path, rows: int) -> float:
    """A different shape is the quickest for each kernel; what does not fit would be quicker still."""
    shape = trial.shape
    if shape.stages == 4:
        return 0.0
    return abs(shape.block_n - 256) + shape.warps if trial.kernel == "sums" else shape.block_m + shape.block_n


def test_the_quickest_that_fits_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")

    def threads(number: int, **options: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(autotune, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(autotune, "_compile", lambda trial, folder: trial.shape.stages != 4)
    monkeypatch.setattr(autotune, "_milliseconds", pretended_milliseconds)
    out = tmp_path / "shapes.json"
    words = ["--out", str(out), "--dims", "128", "768", "--kernels", "sums", "kept_gradient"]
    monkeypatch.setattr(sys, "argv", ["autotune", *words])
    assert autotune.main() == 0
    rows = read_shapes(out)
    # Exponentials are kept in bf16 alone.
    assert [(row["kernel"], row["precision"], row["dim"]) for row in rows] == [
        *(("sums", precision, dim) for precision in ("bfloat16", "float16", "tf32") for dim in (128, 768)),
        *(("kept_gradient", "bfloat16", dim) for dim in (128, 768)),
    ]
    for row in rows:
        tried = autotune.candidates(row["kernel"], row["precision"])
        best = min(
            (shape for shape in tried if shape.stages != 4),
            key=lambda shape: pretended_milliseconds(
                autotune.Trial(row["kernel"], row["precision"], row["dim"], shape), tmp_path, 0
            ),
        )
        assert {name: row[name] for name in ("block_m", "block_n", "warps", "group")} == {
            name: getattr(best, name) for name in ("block_m", "block_n", "warps", "group")
        }
        assert row["device"] == "GPU"


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["autotune"])
    assert autotune.main() == 1
    assert capsys.readouterr().err == "losses.autotune: expected a CUDA GPU, found none\n"
