"""`python -m losses.autotune` writes the fastest shape that fits, for each case asked for."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from losses import autotune
from losses.triton.shapes import read_shapes


def fake_milliseconds(trial: autotune.Trial, folder: Path, rows: int) -> float:
    """The fastest shape differs between kernels; a shape that does not fit would be the fastest of all."""
    shape = trial.shape
    if shape.stages == 4:
        return 0.0
    return abs(shape.block_n - 256) + shape.warps if trial.kernel == "sums" else shape.block_m + shape.block_n


def test_the_fastest_shape_that_fits_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")

    def threads(number: int, **options: Any) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(autotune, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(autotune, "_compile", lambda trial, folder: trial.shape.stages != 4)
    monkeypatch.setattr(autotune, "_milliseconds", fake_milliseconds)
    out = tmp_path / "shapes.json"
    words = ["--out", str(out), "--dims", "128", "768", "--kernels", "sums", "kept_gradient"]
    monkeypatch.setattr(sys, "argv", ["autotune", *words])
    assert autotune.main() == 0
    rows = read_shapes(out)
    # Exponentials are kept in bf16 only.
    assert [(row["kernel"], row["precision"], row["dim"]) for row in rows] == [
        *(("sums", precision, dim) for precision in ("bfloat16", "float16", "tf32") for dim in (128, 768)),
        *(("kept_gradient", "bfloat16", dim) for dim in (128, 768)),
    ]
    for row in rows:
        tried = autotune.candidates(row["kernel"], row["precision"])
        best = min(
            (shape for shape in tried if shape.stages != 4),
            key=lambda shape: fake_milliseconds(
                autotune.Trial(row["kernel"], row["precision"], row["dim"], shape), tmp_path, 0
            ),
        )
        assert {name: row[name] for name in ("block_m", "block_n", "warps", "group")} == {
            name: getattr(best, name) for name in ("block_m", "block_n", "warps", "group")
        }
        assert row["device"] == "GPU"


def test_without_a_gpu_the_error_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["autotune"])
    assert autotune.main() == 1
    assert capsys.readouterr().err == "losses.autotune: expected a CUDA GPU, found none\n"
