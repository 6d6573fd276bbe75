"""Writes every table of the README and the documentation that is generated from the CSV files in scripts/results.

python scripts/benchmarks/tables/readme_tables.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts import RESULTS, ROOT
from scripts.benchmarks.result_rows import read_rows
from scripts.benchmarks.tables.guide_tables import export_tables, size_tables
from scripts.benchmarks.tables.index_tables import index_tables
from scripts.benchmarks.tables.launch_tables import launch_tables
from scripts.benchmarks.tables.markers import fill_tables
from scripts.benchmarks.tables.nested_tables import cross_step_tables, distillation_tables, matryoshka_tables
from scripts.benchmarks.tables.switch_tables import switch_tables
from scripts.benchmarks.tables.throughput_tables import image_tables, throughput_tables


def main() -> None:
    """Write the tables of every page."""
    for page, tables in PAGES.items():
        path = ROOT / page
        path.write_text(fill_tables(path.read_text(encoding="utf-8"), tables(RESULTS)), encoding="utf-8")


def quickstart_tables(results: Path) -> dict[str, str]:
    """The table of README.md, by name."""
    return {"quickstart": quickstart_table(read_rows(results / "quickstart.csv"))}


def emoji_tables(results: Path) -> dict[str, str]:
    """The table of the tutorial on images, by name."""
    return {"emoji": emoji_table(read_rows(results / "emoji.csv"))}


def quickstart_table(rows: list[dict[str, str]]) -> str:
    """What scripts/quickstart.sh measured."""
    lines = [
        f"| {rows[0]['title']} | nDCG@10 | recall@100 |",
        "|---|---:|---:|",
        *(f"| {row['model']} | {float(row['ndcg@10']):.4f} | {float(row['recall@100']):.4f} |" for row in rows),
        "",
        measured_in(rows[0]),
    ]
    return "\n".join(lines) + "\n"


def emoji_table(rows: list[dict[str, str]]) -> str:
    """What scripts/emoji.sh measured, and the values expected by chance."""
    shown = ("image retrieval recall@10", "image retrieval median rank", "image to image recall@10", "acc1", "acc5")
    lines = ["| emoji | measure | value | chance |", "|---|---|---:|---:|"]
    for asks in dict.fromkeys(row["asks"] for row in rows):
        lines += [
            f"| {asks} | {row['measure']} | {float(row['value']):.3g} | {float(row['chance']):.3g} |"
            for row in rows
            if row["asks"] == asks and row["measure"] in shown
        ]
    spent = f"{rows[0]['processor_seconds']} s of processor time, "
    return "\n".join([*lines, "", spent + measured_in(rows[0])]) + "\n"


def measured_in(row: dict[str, str]) -> str:
    """Time, hardware and versions of a run."""
    return f"{row['seconds']} s in all on {row['hardware']} (torch {row['torch']}, commit {row['commit']})."


PAGES: dict[str, Callable[[Path], dict[str, str]]] = {
    "README.md": quickstart_tables,
    "docs/tutorials/images.md": emoji_tables,
    "docs/guides/negatives.md": switch_tables,
    "docs/guides/indexes.md": export_tables,
    "docs/guides/smaller_embeddings.md": lambda results: {**size_tables(results), **matryoshka_tables(results)},
    "docs/guides/distillation.md": distillation_tables,
    "docs/design/losses.md": cross_step_tables,
    "docs/design/training.md": throughput_tables,
    "docs/design/images.md": image_tables,
    "docs/design/indexes.md": index_tables,
    "docs/design/distributed.md": launch_tables,
}

if __name__ == "__main__":
    main()
