"""Write the tables of README.md anew from the committed results: `python scripts/readme_tables.py`."""

from __future__ import annotations

import csv
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent
RESULTS = HOUSE / "scripts" / "results"


def main() -> None:
    """Replace what stands between the markers of every table."""
    readme = HOUSE / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")


def filled(readme: str) -> str:
    """The text with every table between `<!-- NAME -->` and `<!-- /NAME -->` made from its CSV file."""
    for name, table in {"quickstart": quickstart_table()}.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = readme.partition(start)
        _, _, after = rest.partition(end)
        readme = f"{before}{start}{table}{end}{after}"
    return readme


def quickstart_table() -> str:
    """What scripts/quickstart.sh measured, and where."""
    with (RESULTS / "quickstart.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    first = rows[0]
    lines = [
        f"| {first['title']} | nDCG@10 | recall@100 |",
        "|---|---:|---:|",
        *(f"| {row['model']} | {float(row['ndcg@10']):.4f} | {float(row['recall@100']):.4f} |" for row in rows),
        "",
        f"{first['seconds']} s in all on {first['hardware']} (torch {first['torch']}, commit {first['commit']}).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
