"""`retriever search`."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional, UseAppendAction

from index.files import InputError
from index.passages import one_line
from index.progress import Reporter
from retriever.cli.commands.common import IndexDevice, Switch, TruncatedEmbedding
from retriever.errors import check_at_least

if TYPE_CHECKING:
    from retriever.searching.search import Answer

# Unicode categories: control, format (text direction), surrogate, line and paragraph separator.
CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")


@dataclass(frozen=True, kw_only=True)
class Search(IndexDevice, TruncatedEmbedding):
    """Find passages or images for queries.

    Queries are texts given as arguments, in a file, or one per line on standard input; or images. For each query the
    command prints the query, then one line per result: a table on a terminal; otherwise rank, score, id and passage,
    separated by tabs, with control characters escaped.
    """

    query: Positional[tuple[str, ...]]
    """The queries."""
    index: UseAppendAction[tuple[Path, ...]]
    """Folder of `retriever index build`. May be repeated: the indexes are searched as one."""
    queries: Path | None = None
    """File of queries instead: .jsonl, .csv, .tsv or .parquet with the columns _id (or id) and text."""
    image: UseAppendAction[tuple[Path, ...]] = ()
    """An image as the query; may be repeated. Needs an image–text model."""
    k: int = 10
    """Results per query."""
    filter: str | None = None
    """Only passages whose fields match: conditions such as 'year>=2000 lang=en', or JSON such as
    '{"lang": {"$in": ["en", "de"]}}'."""
    mmap: Switch = False
    """Memory-map the index instead of loading it, for indexes larger than memory."""
    verify: Switch = False
    """Check the sha256 of every file of the index first, which reads all of it. By default, index.faiss (with --mmap
    only up to 256 MiB) and lists on disk of up to 256 MiB are checked, and of other files the parts that are read."""

    def __post_init__(self) -> None:
        if not self.index:
            raise ValueError("--index: expected at least one folder, found none")
        if self.query and self.queries:
            raise ValueError("--queries: give queries as arguments or in a file, not both")
        if self.image and (self.query or self.queries):
            raise ValueError("--image: give images or texts as queries, not both")
        for number, text in enumerate(self.query, start=1):
            _check_utf8(text, f"query:{number}")
            if not text.strip():
                raise InputError(f"query:{number}: expected text, found none")

    def run(self, reporter: Reporter) -> int:
        check_at_least(1, k=self.k)
        from retriever.searching.query import parsed_filter
        from retriever.searching.search import BATCH, search
        from retriever.utils.indexes import check_index_device, open_indexes, place_index

        filter = parsed_filter(self.filter)
        check_index_device(self.index_device)
        index = open_indexes(self.index, reporter, mmap=self.mmap, verify=self.verify)
        model = self.load(reporter)
        place_index(index, model.device, reporter, **self.index_options())
        typed = not self.query and not self.image and self.queries is None and sys.stdin.isatty()
        if typed:
            reporter.line("queries, one per line; Ctrl-D ends")
        batch = 1 if typed else BATCH
        for answer in search(model.towers, index, self._queries(), self.k, model.options, batch=batch, filter=filter):
            if self.json:
                print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False), flush=True)
            else:
                _print_answer(answer)
        return 0

    def _queries(self) -> Iterator[tuple[str, str | Path]]:
        """(id, text) of each query, or (id, file) of each image; queries without an id are numbered."""
        from index.beir import read_queries

        if self.queries:
            yield from read_queries(self.queries).items()
            return
        if self.image:
            yield from ((str(number), file) for number, file in enumerate(self.image, start=1))
            return
        texts: Sequence[str] | Iterator[str] = self.query or _typed()
        found = False
        for number, text in enumerate(texts, start=1):
            if text.strip():
                found = True
                yield str(number), text
        if not found:
            raise InputError("expected at least one query, found none")


def _typed() -> Iterator[str]:
    """The lines of standard input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Python would otherwise refuse the whole block that a wrong byte is in.
        sys.stdin.reconfigure(errors="surrogateescape")
    for number, line in enumerate(sys.stdin, start=1):
        _check_utf8(line, f"standard input:{number}")
        yield line.rstrip("\n")


def _check_utf8(text: str, place: str) -> None:
    """Raise an InputError for bytes that are not UTF-8, which Python passes on as lone surrogates."""
    if wrong := re.search("[\udc80-\udcff]", text):
        raise InputError(f"{place}: expected UTF-8, found byte 0x{ord(wrong[0]) - 0xDC00:02x}")


def _print_answer(answer: Answer) -> None:
    if sys.stdout.isatty():
        _draw_answer(answer)
        return
    lines = [escaped(" ".join(answer.query.split()))]
    for result in answer.results:
        text = one_line(result.title, result.text)
        lines.append(f"{result.rank}\t{result.score:.4f}\t{escaped(result.id)}\t{escaped(text)}")
    print("\n".join(lines), flush=True)


def _draw_answer(answer: Answer) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Where it is used: the other commands work beside a user's module of the name eval.
    from eval.reports.escaping import printable

    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right", style="dim")
    table.add_column("score", justify="right")
    table.add_column("id", style="cyan", overflow="fold")
    table.add_column("passage", overflow="ellipsis")
    for result in answer.results:
        text = one_line(result.title, result.text)
        # Text, because rich would interpret markup in a passage.
        table.add_row(str(result.rank), f"{result.score:.4f}", Text(printable(result.id)), Text(printable(text[:300])))
    console = Console()
    console.print(printable(answer.query), style="bold", markup=False, highlight=False)
    console.print(table)


def escaped(text: str) -> str:
    """The text with tabs, line ends and other control characters written as \\t, \\n, \\x1b."""
    from eval.reports.escaping import JOINERS

    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in CONTROLS and c not in JOINERS else c
        for c in text
    )
