"""The table of docs/guides/negatives.md: what each option of the loss does on the bundled sets."""

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
        # Runs that shared the machine have no rate.
        has_rates = any(row["pairs_per_second"] for row in own)
        names = ["option", "WordNet", "lowest – highest", "recall@100", "Jargon", "perlfaq", *["pairs/s"] * has_rates]
        lines = [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
        for name in dict.fromkeys(row["switch"] for row in own):
            runs = [row for row in own if row["switch"] == name]
            scores = [float(row["ndcg@10"]) for row in runs]
            others = [_mean(runs, key) for key in ("recall@100", "jargon_ndcg@10", "perlfaq_ndcg@10")]
            cells = [name, f"{mean(scores):.4f}", f"{min(scores):.4f} – {max(scores):.4f}", *others]
            # The model before training has no rate.
            cells += [_mean(runs, "pairs_per_second", ",.0f")] * has_rates
            lines.append(f"| {' | '.join(cells)} |")
        seeds = len({row["seed"] for row in own})
        first = own[0]
        lines += [
            "",
            f"nDCG@10 of MiniLM after one pass over WordNet in batches of {int(first['batch']):,}: on the test queries "
            f"of WordNet, and on two sets of other domains. {seeds} seeds, on {hardware} (torch {first['torch']}, "
            f"commit {first['commit']}).",
        ]
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def _mean(rows: Sequence[Row], column: str, form: str = ".4f") -> str:
    """The mean of a column over the rows that have it."""
    values = [float(row[column]) for row in rows if row.get(column)]
    return format(mean(values), form) if values else "–"
