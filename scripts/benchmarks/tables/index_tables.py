"""The tables of index/README.md, made from what scripts/benchmarks/index/bench_index.py measured."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

Rows = list[dict[str, str]]


def fill(results: Path, readme: Path) -> None:
    """Write every table between `<!-- NAME -->` and `<!-- /NAME -->` anew; those without results stay as they are."""
    text = readme.read_text(encoding="utf-8")
    tables: dict[str, Callable[[Rows], list[str]]] = {"sizes": _sizes, "targets": _targets, "overhead": _overhead}
    for name, table in tables.items():
        path = results / f"index_{name}.csv"
        if path.exists():
            with path.open(encoding="utf-8", newline="") as stream:
                lines = table(list(csv.DictReader(stream)))
            start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            before, _, rest = text.partition(start)
            text = f"{before}{start}" + "\n".join(lines) + f"\n{end}" + rest.partition(end)[2]
    readme.write_text(text, encoding="utf-8")


def _sizes(rows: Rows) -> list[str]:
    measured = sorted((row for row in rows if row["kind"] == "measured"), key=lambda row: int(row["rows"]))
    computed = [row for row in rows if row["kind"] == "computed"]
    lines = [
        f"Measured on {_where(measured)} that others used at the same time, so times are upper ends: tuned to "
        "recall@10 0.95 on half of the queries, recall on the other half (bench_index.py sizes).",
        "",
        "| set | factory | index MiB | peak MiB of the process | build s | setting | recall | µs of one core a query |",
        "|---|---|---:|---:|---:|---|---:|---:|",
    ]
    for row in measured:
        missed = "" if row["met"] == "True" else " (target missed)"
        lines.append(
            f"| {row['set']}, {int(row['rows']):,} × {row['dim']} | `{row['factory']}` | "
            f"{float(row['index_mib']):,.0f} | {int(row['peak_mib']):,} | "
            f"{float(row['build_s']):,.0f} | {row['settings']} | "
            f"{float(row['recall_other_queries']):.3f}{missed} | {float(row['core_us_per_query']):,.0f} |"
        )
    lines += [
        "",
        "The 10 million were built at the lowest priority beside other work: 71 minutes by the clock, 19 of processor "
        "time; their queries are 500 and 500, of the others 2,000 and 2,000.",
        "",
        "**Computed, not measured**: what larger ones take in memory, or on disk with `--on-disk`; and in hours of one "
        f"core, by the work it is and the rates of {_where(computed)} (bench_index.py computed). On n cores or "
        "machines adding takes an n-th of it; `--gpu` is for the clustering. Take them for upper ends: by the same "
        "rates, measured on a busy machine, the 10 million above take about 40 minutes, where they took 19. Their "
        "recall would be a guess: tune them.",
        "",
        "| vectors | factory | bytes a vector | index GiB | clustering, core h | adding, core h |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in computed:
        gib, each = float(row["index_mib"]) / 1024, float(row["bytes_per_vector"])
        hours = (_hours(row.get(f"{what}_core_s")) for what in ("clustering", "adding"))
        lines.append(f"| {row['set']} | `{row['factory']}` | {each:.0f} | {gib:,.0f} | {' | '.join(hours)} |")
    return [*lines, "", "![memory and time](../scripts/results/index_sizes.png)"]


def _targets(rows: Rows) -> list[str]:
    lines = [
        f"Target 0.95 at k = 10, measured on 4,000 other queries ({_where(rows)}; bench_index.py targets). The "
        "last two columns: how much cheaper, in codes compared, or for pairs in processor time, the "
        "cheapest setting of a fine grid is that has on those queries "
        "the recall of ours, or 0.95.",
        "",
        "| set | factory | tuned on | setting | recall, tuned on | recall, others | cheaper at this recall | at 0.95 |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cheaper = [_percent(row.get(f"cheaper_{at}", "")) for at in ("at_this_recall", "at_the_target")]
        lines.append(
            f"| {row['set']} | `{row['factory']}` | {row['queries']} {row['tuned_on']} | {row['settings']} | "
            f"{float(row['recall_measured']):.4f} | {float(row['recall_other_queries']):.4f} | {' | '.join(cheaper)} |"
        )
    return lines


def _overhead(rows: Rows) -> list[str]:
    lines = [
        f"Ours against faiss {rows[0]['faiss']} driven by hand, in turns in one process (bench_index.py "
        "overhead): the median of the ratios of neighbouring runs by the clock, and in brackets by processor time, "
        "which others on the machine disturb less. "
        "`index`: training and adding alone. `build`: with every byte of the store checked, passages "
        "copied, and everything written summed and flushed; `besides`: the processor time that this takes. `search`: "
        "both on the same index.",
        "",
        "| set | factory | faiss build s | index | build | besides, s of a core | of MiB | search | on |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        index, build, search = (
            f"{row[f'{what}_ratio']} ({row[f'{what}_processor_ratio']})" for what in ("index", "build", "search")
        )
        mib = f"{1024 * float(row['besides_gib']):.0f}" if row["besides_gib"] else ""
        lines.append(
            f"| {row['set']} | `{row['factory']}` | {row['build_faiss_s']} | {index} | {build} | "
            f"{row['besides_processor_s']} | {mib} | {search} | {row['hardware']}, {row['commit']} |"
        )
    return lines


def _hours(seconds: str | None) -> str:
    return f"{float(seconds) / 3600:,.1f}" if seconds else ""


def _percent(share: str) -> str:
    return f"{max(0.0, float(share)):.0%}" if share else ""


def _where(rows: Rows) -> str:
    return f"{rows[0]['hardware']}, faiss {rows[0]['faiss']}"
