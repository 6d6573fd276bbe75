"""Tables of docs/design/training.md and docs/design/images.md: training, encoding and reading images, by hardware."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.benchmarks.result_rows import read_rows

Row = dict[str, str]


def throughput_tables(results: Path) -> dict[str, str]:
    """The tables of docs/design/training.md, by name."""
    makers = {"train": train_table, "encode": encode_table, "encode_memory": memory_table}
    return {name: make(read_rows(results / f"{name}.csv")) for name, make in makers.items()}


def image_tables(results: Path) -> dict[str, str]:
    """The tables of docs/design/images.md, by name."""
    makers = {"image_train": image_train_table, "images": images_table, "encode_images": encode_images_table}
    return {name: make(read_rows(results / f"{name}.csv")) for name, make in makers.items()}


def train_table(rows: Sequence[Row]) -> str:
    """Training: a row for each method and batch size, relative to the best of sentence-transformers at that size."""

    def cells(row: Row, own: Sequence[Row]) -> list[str]:
        theirs = [float(o["pairs_per_second"]) for o in own if o["batch"] == row["batch"] and is_theirs(o)]
        return [
            f"{int(row['batch']):,}",
            row["method"],
            number(row["pairs_per_second"]),
            number(row["tokens_per_second"]),
            f"{float(row['pairs_per_second']) / max(theirs):.2f}" if theirs else "–",
            f"{float(row['flop_utilisation']):.1%}",
            peak(row),
        ]

    heads = ["batch", "training", "pairs/s", "tokens/s", "speed-up", "FLOP utilization", "peak MiB (planned)"]
    return tables(rows, heads, "rlrrrrr", cells)


def encode_table(rows: Sequence[Row]) -> str:
    """Encoding: a row for each method."""

    def cells(row: Row, own: Sequence[Row]) -> list[str]:
        best = max((float(o["tokens_per_second"]) for o in own if is_theirs(o)), default=0.0)
        return [
            row["method"],
            number(row["passages_per_second"]),
            number(row["tokens_per_second"]),
            f"{float(row['tokens_per_second']) / best:.2f}" if best else "–",
            f"{float(row['flop_utilisation']):.1%}",
            peak(row),
        ]

    heads = ["encoding", "passages/s", "tokens/s", "speed-up", "FLOP utilization", "peak MiB (planned)"]
    return tables(rows, heads, "lrrrrr", cells)


def memory_table(rows: Sequence[Row]) -> str:
    """Memory while a long corpus is encoded."""

    def cells(row: Row, own: Sequence[Row]) -> list[str]:
        return [f"{int(row['passages']):,}", number(row["resident_mib"]), number(row["private_mib"])]

    heads = ["passages encoded", "MiB", "MiB without file pages"]
    return tables(rows, heads, "rrr", cells, lambda row: f"A file of {number(row['file_mib'])} MiB. ")


def image_train_table(rows: Sequence[Row]) -> str:
    """Image–text steps against their towers alone, the loss, and features against encoding the images."""

    def cells(row: Row, own: Sequence[Row]) -> list[str]:
        return [
            f"{row['image_tower']}: {label(row['part'])}",
            f"{int(row['pairs']):,}",
            row["seconds"],
            number(row["pairs_per_second"]),
            compared(row),
            peak(row),
        ]

    heads = ["measured", "pairs", "s", "pairs/s", "compared", "peak MiB (planned)"]
    return tables(rows, heads, "lrrrlr", cells, lambda row: f"{sentence(row['data'])}, {row['precision']}. ")


def label(part: str) -> str:
    """Name of a measured part. Older rows say pictures."""
    return part.replace("pictures", "images")


def compared(row: Row) -> str:
    """What an image–text step is compared with."""
    if row["step_over_this"]:
        return f"the step takes {row['step_over_this']} times as long"
    if row["of_step"]:
        return f"{float(row['of_step']):.2%} of the step"
    return f"{row['times_features']} times the step on features" if row["times_features"] else ""


def images_table(rows: Sequence[Row]) -> str:
    """Images per second from tars, relative to the decoder."""

    def cells(row: Row, own: Sequence[Row]) -> list[str]:
        rate, relative = number(row["images_per_second"]), f"{float(row['of_decoder']):.2f}"
        return [row["method"], rate, relative, row["processor_ms"]]

    heads = ["reading", "images/s", "relative to the decoder", "processor ms per image"]
    return tables(rows, heads, "lrrr", cells, lambda row: f"{sentence(row['data'])}. ")


def encode_images_table(rows: Sequence[Row]) -> str:
    """Images per second of `retriever encode` from tars, and the processor time of its parts."""

    def cells(row: Row, own: Sequence[Row]) -> list[str]:
        return [
            f"{row['method']} ({row['device']})" if row["method"] != "decoder" else "decoder",
            number(row["images_per_second"]),
            row["of_decoder"],
            row["processor_ms"],
            row["without_tower"] or "–",
        ]

    heads = [
        "measured",
        "images/s",
        "relative to the decoder",
        "processor ms per image",
        "by processor time, without the tower",
    ]
    return tables(rows, heads, "lrrrr", cells, lambda row: f"{sentence(row['data'])}. ")


def tables(
    rows: Sequence[Row],
    heads: Sequence[str],
    alignment: str,
    cells: Callable[[Row, Sequence[Row]], list[str]],
    note: Callable[[Row], str] = lambda row: "",
) -> str:
    """A table for each hardware, each followed by a line about its rows.

    Args:
        rows: rows of all hardware.
        heads: heads of the columns.
        alignment: "l" or "r" for each column.
        cells: the cells of a row, from the row and all rows of its hardware.
        note: what the line below a table says first, from its first row.
    """
    found = []
    for own in by_hardware(rows):
        lines = ["| " + " | ".join(heads) + " |", "|" + "|".join({"l": "---", "r": "---:"}[a] for a in alignment) + "|"]
        lines += ["| " + " | ".join(cells(row, own)) + " |" for row in own]
        found.append("\n".join([*lines, "", note(own[0]) + where(own)]))
    return "\n\n".join(found) + "\n"


def by_hardware(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each hardware, in the order of the file."""
    return [[row for row in rows if row["hardware"] == name] for name in dict.fromkeys(r["hardware"] for r in rows)]


def is_theirs(row: Row) -> bool:
    """Whether the row measures sentence-transformers."""
    return row["method"].startswith("sentence-transformers")


def number(text: str) -> str:
    """Format a number, without decimals from ten on."""
    value = float(text)
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def peak(row: Row) -> str:
    """Measured peak of GPU memory, and the planned one. Neither is known on a CPU."""
    if not float(row["peak_mib"] or 0):
        return "–"
    return number(row["peak_mib"]) + (f" ({number(row['planned_mib'])})" if row["planned_mib"] else "")


def sentence(text: str) -> str:
    """Capitalize the first letter."""
    return text[:1].upper() + text[1:]


def where(rows: Sequence[Row]) -> str:
    """Hardware, version and commits of the rows."""
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    return f"{rows[0]['hardware']}, torch {rows[0]['torch']}, commit{'s'[: len(commits) - 1]} {', '.join(commits)}."
