"""Write the tables of the READMEs from the committed results: `python scripts/readme_tables.py`.

The READMEs are README.md, retriever/README.md and retriever/data/images/README.md.
"""

from __future__ import annotations

import csv
from pathlib import Path

from throughput_tables import encode_table, image_train_table, images_table, memory_table, train_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "scripts" / "results"


def main() -> None:
    """Replace what stands between the markers of every table."""
    places = {"README.md": tables, "retriever/README.md": throughput, "retriever/data/images/README.md": pictures}
    for readme, make in ((ROOT / place, make) for place, make in places.items()):
        readme.write_text(filled(readme.read_text(encoding="utf-8"), make()), encoding="utf-8")


def tables() -> dict[str, str]:
    """Those of README.md."""
    return {"quickstart": quickstart_table(), "emoji": emoji_table()}


def throughput() -> dict[str, str]:
    """Those of retriever/README.md, of what has been measured."""
    makers = {"train": train_table, "encode": encode_table, "encode_memory": memory_table}
    return {name: make(rows_of(f"{name}.csv")) for name, make in makers.items() if (RESULTS / f"{name}.csv").exists()}


def pictures() -> dict[str, str]:
    """Those of retriever/data/images/README.md."""
    return {"image_train": image_train_table(rows_of("image_train.csv")), "images": images_table(rows_of("images.csv"))}


def filled(readme: str, tables: dict[str, str]) -> str:
    """The text with every table between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = readme.partition(start)
        _, _, after = rest.partition(end)
        readme = f"{before}{start}{table}{end}{after}"
    return readme


def rows_of(name: str) -> list[dict[str, str]]:
    """The rows of a file of committed results."""
    with (RESULTS / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def quickstart_table() -> str:
    """What scripts/quickstart.sh measured, and where."""
    rows = rows_of("quickstart.csv")
    first = rows[0]
    lines = [
        f"| {first['title']} | nDCG@10 | recall@100 |",
        "|---|---:|---:|",
        *(f"| {row['model']} | {float(row['ndcg@10']):.4f} | {float(row['recall@100']):.4f} |" for row in rows),
        "",
        where(first),
    ]
    return "\n".join(lines) + "\n"


def emoji_table() -> str:
    """What scripts/emoji.sh measured, beside chance, and where."""
    rows = rows_of("emoji.csv")
    shown = ("image retrieval recall@10", "image retrieval median rank", "acc1", "acc5")
    lines = ["| emoji | measure | value | chance |", "|---|---|---:|---:|"]
    for asks in dict.fromkeys(row["asks"] for row in rows):
        lines += [
            f"| {asks} | {row['measure']} | {float(row['value']):.3g} | {float(row['chance']):.3g} |"
            for row in rows
            if row["asks"] == asks and row["measure"] in shown
        ]
    return "\n".join([*lines, "", where(rows[0])]) + "\n"


def where(row: dict[str, str]) -> str:
    """How long a run took, on what."""
    return f"{row['seconds']} s in all on {row['hardware']} (torch {row['torch']}, commit {row['commit']})."


if __name__ == "__main__":
    main()
