"""Tables of docs/design/indexes.md: index sizes, recall targets, and the overhead over plain faiss."""

from __future__ import annotations

import textwrap
from pathlib import Path

from scripts.benchmarks.result_rows import read_rows

Rows = list[dict[str, str]]


def index_tables(results: Path) -> dict[str, str]:
    """The tables of docs/design/indexes.md, by name."""
    makers = {"sizes": _sizes, "targets": _targets, "overhead": _overhead}
    tables = {name: "\n".join(make(read_rows(results / f"index_{name}.csv"))) + "\n" for name, make in makers.items()}
    path = results / "gpu_index.csv"
    return {**tables, "gpu_index": gpu_table(read_rows(path))} if path.exists() else tables


def gpu_table(rows: Rows) -> str:
    """What bench_gpu_index.py measured: indexes searched on a GPU and on the cores beside it."""
    lines = [
        "| index | vectors | built in s | searched on | settings | queries | s | recall@10 | times faster |",
        "|---|---|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["what"] == "serve":
            continue
        where, _, effort = row["where"].partition(", ")
        cells = (
            f"`{row['index']}`",
            f"{int(row['rows']):,} × {row['dim']}",
            row["build_s"],
            "GPU" if where.startswith("cuda") else f"{row['threads']} cores",
            row["settings"] or effort,
            f"{int(row['queries']):,}",
            row["search_s"],
            f"{float(row['recall_at_10']):.3f}",
            row["times_faster"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    last = rows[-1]
    lines += ["", f"On {last['hardware']} (faiss {last['faiss']}, torch {last['torch']}, commit {last['commit']})."]
    return "\n".join(lines) + "\n"


def _paragraph(text: str) -> str:
    """A paragraph with lines of at most 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _sizes(rows: Rows) -> list[str]:
    measured = sorted((row for row in rows if row["kind"] == "measured"), key=lambda row: int(row["rows"]))
    computed = [row for row in rows if row["kind"] == "computed"]
    lines = [
        _paragraph(
            "Tuned to a recall@10 of 0.95 on half of the queries; the recall is that of the other half. Measured by "
            f"bench_index.py sizes on {_where(measured)}. The machine was shared, so the times are upper bounds."
        ),
        "",
        "| set | factory | index MiB | peak MiB of the process | build s | setting | recall | core µs per query |",
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
        _paragraph(
            "The index of 10 million vectors was built at the lowest priority beside other work: 71 minutes of wall "
            "time, 19 of processor time. It was tuned and measured on 500 queries each, the others on 2,000 each."
        ),
        "",
        _paragraph(
            "**Computed, not measured**: memory of larger indexes (on disk with `--on-disk`), and build time in "
            f"hours of one core, from the amount of work and the rates of {_where(computed)} (bench_index.py "
            "computed). On n cores or machines, adding takes 1/n of the time; `--gpu` accelerates the clustering. "
            "The times are upper bounds: the same rates, measured on a busy machine, predict 40 minutes for the 10 "
            "million vectors above, which took 19. Recall is not predicted; tune the index."
        ),
        "",
        "| vectors | factory | bytes per vector | index GiB | clustering, core h | adding, core h |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in computed:
        gib, each = float(row["index_mib"]) / 1024, float(row["bytes_per_vector"])
        hours = (_hours(row.get(f"{what}_core_s")) for what in ("clustering", "adding"))
        lines.append(f"| {row['set']} | `{row['factory']}` | {each:.0f} | {gib:,.0f} | {' | '.join(hours)} |")
    return [*lines, "", "![memory and time](../../scripts/results/index_sizes.png)"]


def _targets(rows: Rows) -> list[str]:
    lines = [
        _paragraph(
            f"Target 0.95 at k = 10, measured by bench_index.py targets on 4,000 other queries ({_where(rows)}). The "
            "last two columns compare with the cheapest setting of a fine grid that reaches, on those queries, the "
            "same recall or 0.95: the share of compared codes that it saves (with a k_factor, of processor time)."
        ),
        "",
        "| set | factory | tuned on | setting | recall, tuning | recall, others | saved at this recall | at 0.95 |",
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
        _paragraph(
            f"Ours against plain faiss {rows[0]['faiss']}, alternately in one process (bench_index.py overhead). "
            "Ratios are medians over neighboring runs by wall time and, in brackets, by processor time, which "
            "depends less on other load. `index`: training and adding only. `build`: also verifying the store, "
            "copying the passages, hashing and flushing; `overhead` is the processor time of these. `search`: both "
            "on the same index."
        ),
        "",
        "| set | factory | faiss build s | index | build | overhead, core s | MiB hashed | search | measured on |",
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
