"""Tables of the guides: exports to other engines (indexes.md), and sizes of embeddings (smaller_embeddings.md)."""

from __future__ import annotations

from pathlib import Path

from scripts.benchmarks.result_rows import read_rows


def export_tables(results: Path) -> dict[str, str]:
    """The table of docs/guides/indexes.md, by name."""
    rows = read_rows(results / "export.csv")
    lines = [
        "| engine | version | killed and continued from row | write, s | repeat, s | recall@10 of its exact search |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: row["engine"]):
        lines.append(
            f"| {row['engine']} | {row['version']} | {int(row['continued_from']):,} | {float(row['seconds']):.0f} | "
            f"{float(row['repeated_seconds']):.0f} | {float(row['recall@10']):.4f} |"
        )
    return {"exports": "\n".join(lines) + "\n"}


def size_tables(results: Path) -> dict[str, str]:
    """The table of docs/guides/smaller_embeddings.md, by name."""
    rows = read_rows(results / "sizes.csv")
    whole = float(rows[0]["ndcg@10"])
    lines = [
        "| dimensions | values | bytes | nDCG@10 | difference | recall@100 |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        score = float(row["ndcg@10"])
        lines.append(
            f"| {row['dim']} | {row['precision']} | {int(row['bytes']):,} | {score:.4f} | {score - whole:+.4f} | "
            f"{float(row['recall@100']):.4f} |"
        )
    first = rows[0]
    lines += [
        "",
        f"{first['steps']} steps of {first['batch']} pairs, {first['hardware']} (torch {first['torch']}, commit "
        f"{first['commit']}).",
    ]
    return {"sizes": "\n".join(lines) + "\n"}
