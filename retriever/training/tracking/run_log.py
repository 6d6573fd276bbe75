"""What a training run records: metrics.jsonl, which trackers and the plot receive, and throughput."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from index.files import InputError, atomic_path
from index.records import read_records
from retriever.data.micro_batches import PreparedBatch
from retriever.distributed.ranks import Ranks
from retriever.training.tracking.plot import PLOT_FILE, plot_run
from retriever.training.tracking.trackers import Trackers, open_trackers
from retriever.utils.device import memory_in_use_mib

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Appends rows to metrics.jsonl in a run folder, passes them to trackers, and draws the plot of the run.

    Args:
        run: the run folder.
        step: the step that the run continues from. Later rows of metrics.jsonl, which a killed run has left, are
            removed.
        dev_step: the same for the rows of dev evaluations.
        trackers: names of trackers, see `open_trackers`. Default: none.
        settings: hyper-parameters for the trackers. Default: none.
        plot: whether to draw the plot when the log is closed. Default: False.
    """

    def __init__(
        self,
        run: Path,
        *,
        step: int,
        dev_step: int,
        trackers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        plot: bool = False,
    ) -> None:
        self.path = run / METRICS_FILE
        self.evaluations: dict[int, Mapping[str, Any]]
        """Step -> row of its dev evaluation."""
        rows = _rows_until(self.path, step, dev_step) if self.path.exists() else []
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.evaluations = {row["step"]: row for row in rows if _is_evaluation(row)}
        self._file = self.path.open("a", encoding="utf-8")
        self._plot = run / PLOT_FILE if plot else None
        self._trackers = Trackers(open_trackers(trackers, run, step, settings or {}))

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row, which must have the key "step". Trackers receive its other numbers."""
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if _is_evaluation(row):
            self.evaluations[row["step"]] = row
        self._trackers.log(row)

    def close(self) -> None:
        """Flush and close the files, end the trackers, and draw the plot."""
        self._file.close()
        self._trackers.close()
        if self._plot is not None:
            plot_run([record.fields for record in read_records(self.path)], self._plot)


class NoLog(RunLog):
    """A log that writes nothing, for all ranks but the first."""

    def __init__(self) -> None:
        """Create a log without files."""
        self.evaluations = {}

    def write(self, row: Mapping[str, Any]) -> None:
        """No-op."""

    def close(self) -> None:
        """No-op."""


class ThroughputMeter:
    """Measures pairs and tokens per second, and estimates the remaining time.

    Args:
        device: device whose memory is reported.
        ranks: ranks whose pairs and tokens are added. Default: this process only.
    """

    def __init__(self, device: torch.device, ranks: Ranks | None = None) -> None:
        self._device = device
        self._ranks = ranks or Ranks()
        self._start = self._interval_start = time.perf_counter()
        self._pairs = self._tokens = self._steps = 0

    def add(self, batch: PreparedBatch) -> None:
        """Count a batch."""
        self._steps += 1
        self._pairs += batch.queries
        self._tokens += batch.tokens

    def rates(self) -> dict[str, float]:
        """Return the rates since the last call and start a new interval. Every rank must call it.

        Returns:
            Pairs and tokens (without padding) per second of all ranks, and the largest memory in use of any rank, in
            MiB.
        """
        now = time.perf_counter()
        seconds = now - self._interval_start
        pairs, tokens = self._ranks.all_reduce_sum(self._pairs, self._tokens)
        rates = {
            "pairs_per_second": round(pairs / seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "memory_mib": round(self._ranks.all_reduce_max(memory_in_use_mib(self._device)), 1),
        }
        self._interval_start, self._pairs, self._tokens = now, 0, 0
        return rates

    def exclude_elapsed(self) -> None:
        """Exclude the time since the last call of `rates`, which was spent on an evaluation or a checkpoint."""
        self._interval_start = time.perf_counter()

    def time_left(self, steps: int) -> str:
        """Estimate the time of `steps` further steps, as H:MM:SS."""
        seconds = round((time.perf_counter() - self._start) / max(1, self._steps) * steps)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def format_row(row: Mapping[str, Any]) -> str:
    """Format a row of a training step for the terminal."""
    norm = "overflow" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    pool = ""
    if "pool_accuracy@1" in row:
        pool = f"  pool acc@1 {row['pool_accuracy@1']:.3f} rank {row['pool_rank']:.1f}"
    return (
        f"loss {row['loss']:.4f}  {row['pairs_per_second']:,.0f} pairs/s  {row['tokens_per_second']:,.0f} tokens/s  "
        f"scale {row['logit_scale']:.1f}  {row['memory_mib']:,.0f} MiB  grad {norm}  lr {row['lr']:.1e}{pool}"
    )


def _rows_until(path: Path, step: int, dev_step: int) -> list[dict[str, Any]]:
    """Read the rows up to these steps. The last line may be incomplete if the run was killed."""
    rows, complete_lines = [], 0
    try:
        for record in read_records(path):
            complete_lines += 1
            found = record.fields.get("step")
            if not isinstance(found, int) or isinstance(found, bool):
                raise InputError(f"{record.place}: step: expected a whole number, found {found!r:.60}")
            if found <= (dev_step if _is_evaluation(record.fields) else step):
                rows.append(record.fields)
    except InputError:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if complete_lines < len(lines) - 1:
            raise
    return rows


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return any(name.startswith("dev_") for name in row)
