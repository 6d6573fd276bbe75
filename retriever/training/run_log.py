"""What a run records: metrics.jsonl, TensorBoard events, and the lines a person reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from index.files import InputError, atomic_path
from index.records import read_records

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Appends rows to RUN/metrics.jsonl (and TensorBoard).

    Rows after `step`, and evaluations after `dev_step`, are those of a run that died; they are made again, so they go.
    """

    def __init__(self, run: Path, *, step: int, dev_step: int, tensorboard: bool):
        self.path = run / METRICS_FILE
        kept = _rows_until(self.path, step, dev_step) if self.path.exists() else []
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _summary_writer(run / "tensorboard", step) if tensorboard else None

    def write(self, row: Mapping[str, Any]) -> None:
        """Record one row; it has a "step". Numbers become TensorBoard scalars of their key."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class NoLog(RunLog):
    """For all ranks but the first: one of them records."""

    def __init__(self) -> None:
        """Open nothing."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Record nothing."""

    def close(self) -> None:
        """Close nothing."""


def format_row(row: Mapping[str, Any]) -> str:
    """A training row as a person reads it."""
    norm = "overflow" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    return (
        f"loss {row['loss']:.4f}  {row['pairs_per_second']:,.0f} pairs/s  {row['tokens_per_second']:,.0f} tokens/s  "
        f"scale {row['logit_scale']:.1f}  {row['memory_mib']:,.0f} MiB  grad {norm}  lr {row['lr']:.1e}"
    )


def _rows_until(path: Path, step: int, dev_step: int) -> list[dict[str, Any]]:
    """The rows of at most that step; the last line may be torn if the run was killed while it was written."""
    rows, read = [], 0
    try:
        for record in read_records(path):
            read += 1
            is_evaluation = any(name.startswith("dev_") for name in record.fields)
            if record.fields.get("step", 0) <= (dev_step if is_evaluation else step):
                rows.append(record.fields)
    except InputError:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if read < len(lines) - 1:
            raise
    return rows


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError('tensorboard: true needs TensorBoard: pip install "dense-retriever[tensorboard]"') from None
    return SummaryWriter(str(folder), purge_step=step + 1)
