"""Tables of docs/design/distributed.md: the distributed loss, and the largest batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from scripts.benchmarks.result_rows import read_rows

Rows = list[dict[str, str]]


def launch_tables(results: Path) -> dict[str, str]:
    """The tables of docs/design/distributed.md, by name. A table without results says so."""
    makers: dict[str, tuple[str, Callable[[Rows], list[str]]]] = {
        "ring": ("ring.csv", ring),
        "largest": ("largest_batch.csv", largest_batch),
        "scale": ("scale.csv", scale),
    }
    tables = {}
    for name, (file, make) in makers.items():
        path = results / file
        lines = make(read_rows(path)) if path.exists() else [f"Not measured yet: no {file}."]
        tables[name] = "\n".join(lines) + "\n"
    return tables


def ring(rows: Rows) -> list[str]:
    """Speed on several ranks, the ablation, and the overlap of communication with computation."""
    lines = [f"Measured by bench_ring.py on {where(rows)}.", ""]
    lines += ["| pairs | method | GPUs | ms | speed-up |", "|---:|---|---:|---:|---:|"]
    for row in (row for row in rows if row["part"] == "speed"):
        times = f"{float(row['times_one_rank']):.2f}" if row["times_one_rank"] else ""
        lines.append(f"| {count(row)} | {row['method']} | {row['ranks']} | {figure(row, 'milliseconds')} | {times} |")
    ablation = [row for row in rows if row["part"] == "ablation"]
    if ablation:
        title = f"{count(ablation[0])} pairs on {ablation[0]['ranks']} GPUs"
        lines += ["", f"| {title} | ms | MiB beyond the embeddings |", "|---|---:|---:|"]
    lines += [f"| {row['method']} | {figure(row, 'milliseconds')} | {figure(row, 'extra_mib')} |" for row in ablation]
    for row in (row for row in rows if row["part"] == "profile"):
        lines += ["", f"Under the profiler, {count(row)} pairs on {row['ranks']} GPUs: {row['status']}."]
    return lines


def largest_batch(rows: Rows) -> list[str]:
    """The largest batch of each method, with time and memory."""
    about = f"{int(rows[0]['parameters']) / 1e6:.0f} M parameters, texts of {rows[0]['tokens']} tokens"
    lines = [f"Measured by bench_largest_batch.py on one {where(rows)}: {about}.", ""]
    lines += ["| method | pairs | s per step | peak GiB | out of memory at |", "|---|---:|---:|---:|---:|"]
    for method, fitted, failed in by_method(rows, "trained"):
        if fitted:
            peak = float(fitted["peak_mib"]) / 1024
            lines.append(f"| {method} | {count(fitted)} | {figure(fitted, 'seconds')} | {peak:.1f} | {failed} |")
        else:
            lines.append(f"| {method} | | | | {failed} |")
    return lines


def scale(rows: Rows) -> list[str]:
    """Memory of the losses, the largest batches, and the speed-up."""
    lines = [f"Measured by bench_scale.py on {max(int(row['ranks']) for row in rows)} × {where(rows)}."]
    # Sizes that were not tried are empty cells.
    tried = [row for row in rows if row["status"] != "no time left"]
    losses = [row for row in tried if row["part"] == "loss"]
    if losses:
        lines += ["", "Peak GiB per GPU of the loss, including embeddings and gradients, and ms:", ""]
        lines += by_size(losses)
    steps = [row for row in tried if row["part"] == "step"]
    if steps:
        lines += ["", "Peak GiB per GPU of a whole optimizer step, and ms:", ""]
        lines += by_size([{**row, "method": f"{row['towers']}, {row['method']}"} for row in steps])
        lines += ["", "| largest batch, whole steps | pairs | s | pairs/s | peak GiB | out of memory at |"]
        lines.append("|---|---:|---:|---:|---:|---:|")
    for towers in dict.fromkeys(row["towers"] for row in steps):
        own = [row for row in rows if row["part"] == "step" and row["towers"] == towers]
        for method, fitted, failed in by_method(own, "measured"):
            shown = "| | |"
            if fitted:
                peak = f"{float(fitted['peak_mib']) / 1024:.1f}" if fitted["peak_mib"] else ""
                rate = f"{int(fitted['pairs_per_second']):,}"
                shown = f"{float(fitted['milliseconds']) / 1000:.2f} | {rate} | {peak} |"
            lines.append(f"| {towers}, {method} | {count(fitted) if fitted else ''} | {shown} {failed} |")
    scaling = [row for row in tried if row["part"] == "scaling"]
    if scaling:
        lines += ["", "| loss on several GPUs | GPUs | ms | efficiency | transfers not hidden | share of the step |"]
        lines.append("|---:|---:|---:|---:|---:|---:|")
    for row in scaling:
        shares = " | ".join(
            f"{100 * float(row[name]):.0f} %" if row[name] else ""
            for name in ("efficiency", "not_hidden", "not_hidden_of_step")
        )
        lines.append(f"| {count(row)} pairs | {row['ranks']} | {figure(row, 'milliseconds')} | {shares} |")
    return lines


def by_size(rows: Rows) -> list[str]:
    """A table of memory and time: a row for each method, a column for each batch size."""
    sizes = sorted({row["pairs"] for row in rows}, key=int)
    lines = ["| pairs | " + " | ".join(f"{int(size):,}" for size in sizes) + " |", "|---|" + "---:|" * len(sizes)]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = {row["pairs"]: memory_and_time(row) for row in rows if row["method"] == method}
        lines.append(f"| {method} | " + " | ".join(cells.get(size, "") for size in sizes) + " |")
    return lines


def by_method(rows: Rows, made: str) -> list[tuple[str, dict[str, str], str]]:
    """For each method, the row of the largest batch that was measured, and the smallest that ran out of memory or out
    of time."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        some = sorted((row for row in rows if row["method"] == method), key=lambda row: int(row["pairs"]))
        fitted = [row for row in some if row["status"] == made]
        failed = [count(row) for row in some if row["status"] == "out of memory"]
        failed += [f"{count(row)} not tried" for row in some if row["status"] == "no time left"]
        found.append((method, fitted[-1] if fitted else {}, failed[0] if failed else ""))
    return found


def memory_and_time(row: dict[str, str]) -> str:
    """A cell of the memory table."""
    if row["status"] != "measured":
        return row["status"]
    memory = f"{float(row['peak_mib']) / 1024:.2f}" if row["peak_mib"] else ""
    return f"{memory}, {figure(row, 'milliseconds')}".removeprefix(", ")


def figure(row: dict[str, str], name: str) -> str:
    """A number, or the reason why there is none."""
    if not row[name]:
        return row["status"] if row["status"] != "measured" else ""
    return f"{float(row[name]):,.0f}" if float(row[name]) >= 100 else f"{float(row[name]):.3g}"


def count(row: dict[str, str]) -> str:
    """The number of pairs."""
    return f"{int(row['pairs']):,}"


def where(rows: Rows) -> str:
    """Hardware, version and commits of the rows."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{rows[0]['hardware']} (torch {rows[0]['torch']}, commit {commits})"
