"""Write the tables of scripts/launch/README.md from the committed results.

python scripts/benchmarks/tables/launch_tables.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts import RESULTS, ROOT
from scripts.benchmarks.result_rows import read_rows

README = ROOT / "scripts" / "launch" / "README.md"
Rows = list[dict[str, str]]


def main() -> None:
    """Replace what stands between the markers of every table."""
    README.write_text(filled(README.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


def filled(readme: str, results: Path) -> str:
    """The text with every table between `<!-- NAME -->` and `<!-- /NAME -->` made from its rows."""
    tables: dict[str, tuple[str, Callable[[Rows], list[str]]]] = {
        "ring": ("ring.csv", ring),
        "largest": ("largest_batch.csv", largest_batch),
        "scale": ("scale.csv", scale),
    }
    for name, (file, table) in tables.items():
        table_file = results / file
        lines = table(read_rows(table_file)) if table_file.exists() else [f"Not measured yet: no {file}."]
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = readme.partition(start)
        readme = f"{before}{start}" + "\n".join(lines) + f"\n{end}" + rest.partition(end)[2]
    return readme


def ring(rows: Rows) -> list[str]:
    """Speed over ranks, the ablation, and what is hidden."""
    lines = [f"By scripts/benchmarks/distributed/bench_ring.py on {where(rows)}.", ""]
    lines += ["| pairs | way | GPUs | ms | times one GPU |", "|---:|---|---:|---:|---:|"]
    for row in (row for row in rows if row["part"] == "speed"):
        times = f"{float(row['times_one_rank']):.2f}" if row["times_one_rank"] else ""
        lines.append(f"| {count(row)} | {row['method']} | {row['ranks']} | {figure(row, 'milliseconds')} | {times} |")
    ablation = [row for row in rows if row["part"] == "ablation"]
    if ablation:
        title = f"{count(ablation[0])} pairs on {ablation[0]['ranks']} GPUs"
        lines += ["", f"| {title} | ms | MiB beside the embeddings |", "|---|---:|---:|"]
    lines += [f"| {row['method']} | {figure(row, 'milliseconds')} | {figure(row, 'extra_mib')} |" for row in ablation]
    for row in (row for row in rows if row["part"] == "profile"):
        lines += ["", f"Under the profiler, {count(row)} pairs on {row['ranks']} GPUs: {row['status']}."]
    return lines


def largest_batch(rows: Rows) -> list[str]:
    """The largest batch of each way, with its time and memory."""
    about = f"{int(rows[0]['parameters']) / 1e6:.0f} M parameters, texts of {rows[0]['tokens']} tokens"
    lines = [f"By scripts/benchmarks/distributed/bench_largest_batch.py on one of {where(rows)}: {about}.", ""]
    lines += ["| way | pairs | s a step | peak GiB | out of memory at |", "|---|---:|---:|---:|---:|"]
    for method, fitted, failed in by_method(rows, "trained"):
        if fitted:
            peak = float(fitted["peak_mib"]) / 1024
            lines.append(f"| {method} | {count(fitted)} | {figure(fitted, 'seconds')} | {peak:.1f} | {failed} |")
        else:
            lines.append(f"| {method} | | | | {failed} |")
    return lines


def scale(rows: Rows) -> list[str]:
    """Memory of the losses, largest batches, speed."""
    lines = [
        f"By scripts/benchmarks/distributed/bench_scale.py on {max(int(row['ranks']) for row in rows)} × {where(rows)}."
    ]
    # Cells without a row are empty; what no time was left for says nothing else.
    tried = [row for row in rows if row["status"] != "no time left"]
    losses = [row for row in tried if row["part"] == "loss"]
    if losses:
        lines += ["", "GiB on each GPU at the peak of the loss, embeddings and gradients included, and ms:", ""]
        lines += by_size(losses)
    steps = [row for row in tried if row["part"] == "step"]
    if steps:
        lines += ["", "GiB on each GPU at the peak of a whole optimizer step, and ms:", ""]
        lines += by_size([{**row, "method": f"{row['towers']}, {row['method']}"} for row in steps])
        lines += ["", "| whole steps: the largest batch | pairs | s | pairs/s | peak GiB | out of memory at |"]
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
        lines += ["", "| the loss by more GPUs | GPUs | ms | of perfect | transfers not hidden | of the step |"]
        lines.append("|---:|---:|---:|---:|---:|---:|")
    for row in scaling:
        shares = " | ".join(
            f"{100 * float(row[name]):.0f} %" if row[name] else ""
            for name in ("efficiency", "not_hidden", "not_hidden_of_step")
        )
        lines.append(f"| {count(row)} pairs | {row['ranks']} | {figure(row, 'milliseconds')} | {shares} |")
    return lines


def by_size(rows: Rows) -> list[str]:
    """A table of memory and time, a row for each method and a column for each size of the batch."""
    sizes = sorted({row["pairs"] for row in rows}, key=int)
    lines = ["| pairs | " + " | ".join(f"{int(size):,}" for size in sizes) + " |", "|---|" + "---:|" * len(sizes)]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = {row["pairs"]: memory_and_time(row) for row in rows if row["method"] == method}
        lines.append(f"| {method} | " + " | ".join(cells.get(size, "") for size in sizes) + " |")
    return lines


def by_method(rows: Rows, made: str) -> list[tuple[str, dict[str, str], str]]:
    """Of each method the row of the largest batch that was made, and the smallest that ran out of memory, or that no
    time was left for."""
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
    """A number to read, or why there is none."""
    if not row[name]:
        return row["status"] if row["status"] != "measured" else ""
    return f"{float(row[name]):,.0f}" if float(row[name]) >= 100 else f"{float(row[name]):.3g}"


def count(row: dict[str, str]) -> str:
    """Its pairs."""
    return f"{int(row['pairs']):,}"


def where(rows: Rows) -> str:
    """Hardware, torch and commits."""
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{rows[0]['hardware']} (torch {rows[0]['torch']}, commit {commits})"


if __name__ == "__main__":
    main()
