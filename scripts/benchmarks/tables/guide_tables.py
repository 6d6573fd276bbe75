"""Tables of the guides: exports to other engines (indexes.md), and sizes of embeddings (smaller_embeddings.md)."""

from __future__ import annotations

import textwrap
from pathlib import Path

from scripts.benchmarks.result_rows import read_rows


def export_tables(results: Path) -> dict[str, str]:
    """The table of docs/guides/indexes.md, by name: the fastest run of each engine, and what the other runs found."""
    rows = sorted(read_rows(results / "export.csv"), key=lambda row: (row["engine"], float(row["seconds"])))
    fastest = {row["engine"]: row for row in reversed(rows)}
    lines = [
        "| engine | version | killed and continued from row | write, s | repeat, s | recall@10 of its exact search |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for engine, row in sorted(fastest.items()):
        lines.append(
            f"| {engine} | {row['version']} | {int(row['continued_from']):,} | {float(row['seconds']):.0f} | "
            f"{float(row['repeated_seconds']):.0f} | {float(row['recall@10']):.4f} |"
        )
    others = [row for row in rows if row not in fastest.values()]
    for commit in dict.fromkeys(row["commit"] for row in others):
        again = [row for row in others if row["commit"] == commit]
        names = ", ".join(f"{row['engine']} {row['version']}" for row in again)
        recall = min(float(row["recall@10"]) for row in again)
        lines += ["", f"Exported again at commit {commit}, on a machine under load: {names}; recall@10 {recall:.4f}."]
    return {"exports": "\n".join(lines) + "\n"}


def size_tables(results: Path) -> dict[str, str]:
    """The table of docs/guides/smaller_embeddings.md, by name, with what a model loses that was not trained for it."""
    all_rows = read_rows(results / "sizes.csv")
    rows = [row for row in all_rows if int(row["steps"])]
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
    if untrained := [row for row in all_rows if not int(row["steps"])]:
        whole = float(untrained[0]["ndcg@10"])
        differences = ", ".join(
            f"{float(row['ndcg@10']) - whole:+.4f} with {_values(row, untrained[0])}"
            for row in untrained[1:]
            if row["dim"] == untrained[0]["dim"] or row["precision"] == "float32"
        )
        text = f"MiniLM without this training (commit {untrained[0]['commit']}): {whole:.4f} with all float32 values, "
        lines += ["", *textwrap.wrap(f"{text}{differences}.", 120)]
    return {"sizes": "\n".join(lines) + "\n"}


def _values(row: dict[str, str], full: dict[str, str]) -> str:
    return row["precision"] if row["dim"] == full["dim"] else f"{row['dim']} of them"
