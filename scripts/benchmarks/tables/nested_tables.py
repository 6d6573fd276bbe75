"""The tables of bench_nested_training.py (Matryoshka, distillation, query tower alone) and bench_cross_step.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from scripts.benchmarks.result_rows import read_rows

Row = dict[str, str]


def matryoshka_tables(results: Path) -> dict[str, str]:
    """The table of docs/guides/smaller_embeddings.md, by name; none before the benchmark has run."""
    return {"matryoshka": dimension_table(rows)} if (rows := _rows(results, "matryoshka")) else {}


def distillation_tables(results: Path) -> dict[str, str]:
    """The tables of docs/guides/distillation.md, by name; none before the benchmark has run."""
    names = {"distillation": "distillation", "query_tower": "query tower"}
    # The plain run is the student without a teacher.
    found = {name: _rows(results, comparison) for name, comparison in names.items()}
    if found["distillation"]:
        plain = [row for row in _rows(results, "matryoshka") if row["run"] == "plain"]
        full = max((int(row["dim"]) for row in plain), default=0)
        without = [{**row, "run": "student without"} for row in plain if int(row["dim"]) == full]
        found["distillation"] = [*without, *found["distillation"]]
    return {name: run_table(rows) for name, rows in found.items() if rows}


def cross_step_tables(results: Path) -> dict[str, str]:
    """The table of docs/design/losses.md about passages of earlier steps; none before the benchmark has run."""
    path = results / "cross_step.csv"
    return {"cross_step": cross_step_table(read_rows(path))} if path.exists() else {}


def cross_step_table(rows: Sequence[Row]) -> str:
    """The mean dev nDCG@10 over the seeds of each run, on the hardware and with the settings of the last one."""
    rows = _like_the_last(rows)
    lines = ["| further negatives | dev nDCG@10 | loss | cosine of the oldest | s |", "|---|---:|---:|---:|---:|"]
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        score, loss, cosine, seconds = (
            mean(float(row[key]) for row in own) for key in ("dev_ndcg@10", "loss", "oldest_cosine", "seconds")
        )
        lines.append(f"| {run} | {score:.4f} | {loss:.3f} | {cosine:.3f} | {seconds:.1f} |")
    last = rows[-1]
    passages = "all passages" if last["passages"] == "0" else f"{int(last['passages']):,} passages"
    lines += [
        "",
        f"MiniLM on {passages} of WordNet, {int(last['steps']):,} steps of {int(last['batch']):,} pairs, "
        f"{len({row['seed'] for row in rows})} seeds, on {last['hardware']} (torch {last['torch']}, commit "
        f"{last['commit']}). Cosine: between the embeddings of the oldest step of the memory and those of the trained "
        "model; losses with other negatives are not comparable.",
    ]
    return "\n".join(lines) + "\n"


def dimension_table(rows: Sequence[Row]) -> str:
    """The mean nDCG@10 over the seeds of each run, by dimension."""
    dims = sorted({int(row["dim"]) for row in rows})
    lines = [f"| model | {' | '.join(map(str, dims))} |", "|---|" + "---:|" * len(dims)]
    for run in dict.fromkeys(row["run"] for row in rows):
        cells = [_mean(rows, run, dim) for dim in dims]
        lines.append(f"| {run} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _conditions(rows)]) + "\n"


def run_table(rows: Sequence[Row]) -> str:
    """The mean nDCG@10 and recall@100 over the seeds of each run, and the lowest and highest nDCG@10."""
    lines = ["| run | nDCG@10 | lowest – highest | recall@100 |", "|---|---:|---:|---:|"]
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        scores = [float(row["ndcg@10"]) for row in own]
        recall = mean(float(row["recall@100"]) for row in own)
        lines.append(f"| {run} | {mean(scores):.4f} | {min(scores):.4f} – {max(scores):.4f} | {recall:.4f} |")
    return "\n".join([*lines, "", _conditions(rows)]) + "\n"


def _rows(results: Path, comparison: str) -> list[Row]:
    """The rows of a comparison on the hardware and with the settings of the last one."""
    path = results / "nested_training.csv"
    rows = [row for row in read_rows(path) if row["comparison"] == comparison] if path.exists() else []
    return _like_the_last(rows)


def _like_the_last(rows: Sequence[Row]) -> list[Row]:
    same = ("hardware", "passages", "steps", "batch", "lr")
    return [row for row in rows if all(row[key] == rows[-1][key] for key in same)]


def _mean(rows: Sequence[Row], run: str, dim: int) -> str:
    scores = [float(row["ndcg@10"]) for row in rows if row["run"] == run and int(row["dim"]) == dim]
    return f"{mean(scores):.4f}" if scores else "–"


def _conditions(rows: Sequence[Row]) -> str:
    last = rows[-1]
    seeds = len({row["seed"] for row in rows})
    return (
        f"nDCG@10 on the test definitions of WordNet, {int(last['passages']):,} passages; {int(last['steps']):,} steps "
        f"of {int(last['batch']):,} pairs, {seeds} seeds, on {last['hardware']} (torch {last['torch']}, commit "
        f"{last['commit']})."
    )
