"""The public function `retriever.study`, which compares training runs over batch sizes, learning rates and seeds."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from index.files import InputError, locked_folder, read_json, recover_folder, write_json
from index.progress import Progress, Reporter, as_reporter
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import CONFIG_FILE, config_from_mapping, with_absolute_paths
from retriever.errors import ArgumentError, ConfigError, NotFiniteError, check_at_least, check_choice, check_numbers
from retriever.selection.cells import Cell, Scaling, all_cells
from retriever.selection.estimate import measure_speed, steps_of
from retriever.selection.study_report import Result, Row, write_report
from retriever.training.train import TrainingRun, as_config, train

STUDY_FILE, RESULT_FILE = "study.json", "result.json"


@dataclass(frozen=True)
class Study:
    """What `retriever.study` returns.

    Attributes:
        folder: Folder of the study: study.csv, study.md, study.png, cells.csv, and a run for each cell in cells/.
        metric: Name of the measure on the dev set.
        rows: One for each batch size and learning rate; empty with `dry_run`.
        plan: Lines that describe the cells, their steps and, with `dry_run`, their estimated time.
    """

    folder: Path
    metric: str
    rows: tuple[Row, ...]
    plan: tuple[str, ...]


def study(
    config: str | Path | TrainConfig | Mapping[str, Any],
    out: str | Path,
    *,
    batch_size: Sequence[int] | None = None,
    lr: Sequence[float] | None = None,
    seeds: Sequence[int] = (0,),
    lr_scaling: Scaling = "sqrt",
    dry_run: bool = False,
    progress: Progress = None,
) -> Study:
    """Train a run for each combination of batch size, learning rate and seed, and report quality, time and memory.

    A combination is called a cell of the study. All runs are made in this process, one after the other, with the number
    of epochs or steps of the configuration. A study that was stopped or killed continues with the same call: finished
    cells are not repeated, and the interrupted one resumes from its last checkpoint. Further batch sizes, rates or
    seeds can be added to a finished study. A run that fails because memory runs out or the loss is not finite is
    reported as such.

    Args:
        config: A YAML file, a `TrainConfig`, or a mapping with the keys of the YAML file, with a dev set.
        out: Folder of the study.
        batch_size: Batch sizes. Default: None, that of the configuration.
        lr: Learning rates at the batch size of the configuration. Default: None, that of the configuration.
        seeds: Random seeds. Default: (0,).
        lr_scaling: How all learning rates are scaled at another batch size than that of the configuration: "sqrt", by
            the square root of the ratio of the batch sizes (arXiv 2205.10287), "linear", by the ratio, or "none".
            Default: "sqrt".
        dry_run: Only plan: count the steps, time some steps and an evaluation at the smallest batch size, and estimate
            the time of all cells. Default: False.
        progress: Called with a `ProgressEvent` at each step. Default: None.

    Returns:
        The table and the plan.

    Raises:
        ConfigError: An argument or the configuration is invalid, or it has no dev set.
        InputError: Model or data cannot be read, a batch is larger than the data, or the folder holds a study of
            another configuration.
        Interrupted: SIGINT or SIGTERM arrived; the same call continues the study.
    """
    base, folder, reporter = with_absolute_paths(as_config(config)), Path(out), as_reporter(progress)
    sizes = list(dict.fromkeys(batch_size or (base.batch_size,)))
    rates = list(dict.fromkeys(lr or (base.optim.lr,)))
    check_choice(get_args(Scaling), lr_scaling=lr_scaling)
    for size in sizes:
        check_at_least(1, batch_size=size)
    for rate in rates:
        check_numbers(lr=rate)
    for seed in seeds:
        check_at_least(0, seeds=seed)
    if not seeds:
        raise ArgumentError("seeds", "expected at least one, found none")
    if not (base.dev.path or base.dev.paths):
        raise ConfigError("dev.path: expected a dev set, on which the runs of a study are compared, found none")
    cells = all_cells(base, sizes, rates, list(dict.fromkeys(seeds)), lr_scaling)
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder):
        _check_same_study(folder, base, lr_scaling)
        # All configurations are checked before the first run.
        configs = {cell: cell.config(base, folder / "cells" / cell.name, folder / "cache") for cell in cells}
        of_size = {cell.batch_size: configs[cell] for cell in cells}
        steps = steps_of(of_size.values(), folder, reporter)
        plan = _plan(cells, configs, steps, folder, dry_run, reporter)
        if dry_run:
            return Study(folder, "", (), tuple(plan))
        write_json(folder / STUDY_FILE, {"config": _settings(base), "lr_scaling": lr_scaling})
        for line in plan:
            reporter.line(line)
        metric, results = "", list[tuple[Cell, Result]]()
        rule = {
            "sqrt": f"Learning rates are those at batch size {base.batch_size:,}, times the square root of the ratio.",
            "linear": f"Learning rates are those at batch size {base.batch_size:,}, times the ratio.",
            "none": "Learning rates do not depend on the batch size.",
        }[lr_scaling]
        rows: list[Row] = []
        for number, cell in enumerate(cells, start=1):
            result = _run_cell(configs[cell], f"cell {number} of {len(cells)}, {cell.name}", reporter)
            metric = result.get("metric", metric)
            results.append((cell, result))
            # After each cell, so that a long study can be read while it runs.
            rows = write_report(folder, metric, rule, results, reporter, plot=number == len(cells))
    return Study(folder, metric, tuple(rows), tuple(plan))


def _plan(
    cells: Sequence[Cell],
    configs: Mapping[Cell, TrainConfig],
    steps: Mapping[int, int],
    folder: Path,
    timed: bool,
    reporter: Reporter,
) -> list[str]:
    done = {cell for cell in cells if _finished(Path(configs[cell].out))}
    smallest = min(cells, key=lambda cell: cell.batch_size)
    speed = measure_speed(configs[smallest], folder, reporter) if timed and len(done) < len(cells) else None
    lines, total = [], 0.0
    for cell in cells:
        seconds = 0.0 if speed is None or cell in done else speed.seconds(configs[cell], steps[cell.batch_size])
        total += seconds
        state = "done" if cell in done else "" if speed is None else f"about {seconds / 60:,.1f} min"
        lines.append(
            f"batch size {cell.batch_size:>9,}  lr {cell.lr * cell.factor:<8.2g}  seed {cell.seed}  "
            f"{steps[cell.batch_size]:>7,} steps  {state}".rstrip()
        )
    summary = f"{len(cells)} cells, {len(done)} of them done"
    if speed is not None:
        summary += f"; about {total / 60:,.1f} min for the others, from a few steps at the smallest batch size"
    return [*lines, summary]


def _run_cell(config: TrainConfig, title: str, reporter: Reporter) -> Result:
    """Train the run of a cell, or continue it, or read its result."""
    folder = Path(config.out)
    if _finished(folder):
        # The replaced model of a run that could not remove it, because a limit of its process was reached.
        recover_folder(folder / "model")
        found: Result = read_json(folder / RESULT_FILE)
        return found
    reporter.line(title)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    result: Result
    try:
        if (folder / CONFIG_FILE).exists():
            run = train(resume=folder, progress=reporter)
        else:
            run = train(config, progress=reporter)
        result = _result(run, config)
    except (torch.OutOfMemoryError, MemoryError):
        result = {"error": "out of memory"}
    except NotFiniteError as error:
        result = {"error": str(error)}
    # The memory of the next cell is measured in the same process.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT_FILE, result)
    # A finished run is not resumed. Its model and metrics stay.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if "error" in result:
        reporter.line(f"{title}: {result['error']}")
    return result


def _result(run: TrainingRun, config: TrainConfig) -> Result:
    rows = [row for row in run.metrics if "loss" in row]
    steps = [0, *(row["step"] for row in rows)]
    # From the logged rates, which are also those of the steps before an interruption.
    pairs = [(after - before) * config.batch_size for before, after in itertools.pairwise(steps)]
    seconds = sum(count / row["pairs_per_second"] for count, row in zip(pairs, rows, strict=True))
    return {
        "metric": run.dev_metric,
        "score": run.best_score,
        "best_step": run.best_step,
        "steps": run.step,
        "seconds": round(seconds, 3),
        "memory_mib": max(row["memory_mib"] for row in rows),
    }


def _finished(folder: Path) -> bool:
    return (folder / RESULT_FILE).is_file()


def _settings(base: TrainConfig) -> dict[str, Any]:
    """The settings that all cells of a study share."""
    tree = dataclasses.asdict(config_from_mapping(dataclasses.asdict(base)))
    for name in ("out", "seed"):
        del tree[name]
    return tree


def _check_same_study(folder: Path, base: TrainConfig, scaling: Scaling) -> None:
    """Refuse a folder with something else than this study."""
    if not (folder / STUDY_FILE).exists():
        allowed = ("cache", "cells")
        others = [p.name for p in folder.iterdir() if p.name not in allowed and not p.name.startswith(".")]
        if others:
            raise InputError(f"{folder}: expected a new folder, or that of a study, found {others[0]} in it")
        return
    found = read_json(folder / STUDY_FILE)
    expected = {"config": _as_json(_settings(base)), "lr_scaling": scaling}
    for name in expected:
        if found.get(name) != expected[name]:
            raise InputError(
                f"{folder}: holds a study with another {_first_difference(name, found.get(name), expected[name])}"
            )


def _as_json(value: Any) -> Any:
    """Tuples as lists, as they are read from a file."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def _first_difference(name: str, found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in {**expected, **found}:
            if found.get(key) != expected.get(key):
                return _first_difference(
                    key if name == "config" else f"{name}.{key}", found.get(key), expected.get(key)
                )
    return f"{name}: expected {expected!r:.60}, found {found!r:.60}"
