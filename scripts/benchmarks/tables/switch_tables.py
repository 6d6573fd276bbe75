"""The table of docs/guides/negatives.md: what each option of the loss does on WordNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from scripts.benchmarks.result_rows import read_rows

Row = dict[str, str]


def switch_tables(results: Path) -> dict[str, str]:
    """The table of the guide, by name; none before the benchmark has run."""
    path = results / "switches.csv"
    return {"switches": switch_table(read_rows(path))} if path.exists() else {}


def switch_table(rows: Sequence[Row]) -> str:
    """Means over the seeds of each option, with the lowest and the highest nDCG@10, for each hardware."""
    tables = []
    for hardware in dict.fromkeys(row["hardware"] for row in rows):
        own = [row for row in rows if row["hardware"] == hardware]
        lines = ["| option | nDCG@10 | lowest – highest | recall@100 | pairs/s |", "|---|---:|---:|---:|---:|"]
        for name in dict.fromkeys(row["switch"] for row in own):
            runs = [row for row in own if row["switch"] == name]
            scores = [float(row["ndcg@10"]) for row in runs]
            recall, rate = (mean(float(row[key]) for row in runs) for key in ("recall@100", "pairs_per_second"))
            lines.append(
                f"| {name} | {mean(scores):.4f} | {min(scores):.4f} – {max(scores):.4f} | {recall:.4f} | {rate:,.0f} |"
            )
        seeds = len({row["seed"] for row in own})
        first = own[0]
        lines += [
            "",
            f"MiniLM on WordNet, one pass in batches of {int(first['batch']):,}, {seeds} seeds, on {hardware} "
            f"(torch {first['torch']}, commit {first['commit']}).",
        ]
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"
