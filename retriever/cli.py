"""The command line: each subcommand is a dataclass whose fields are its flags and whose `run` does the work."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg, subcommand

from index.files import InputError
from retriever.config import ConfigError, TrainConfig, load_config
from retriever.interrupt import Interrupted, sigterm_interrupts
from retriever.progress import Terminal

DESCRIPTION = "Train dense retrieval models, embed and index a corpus, search it, measure how well it retrieves."

Precision = Literal["fp32", "bf16", "fp16"]
Switch = Annotated[bool, FlagCreatePairsOff]


@dataclass(frozen=True)
class Train:
    """Train towers on pairs: `retriever train run.yaml [--any.field value]`, or `retriever train --resume RUN`."""

    file: Annotated[Positional[str | None], arg(metavar="[RUN.YAML]")] = None
    """YAML file with the configuration; flags override it."""
    config: Annotated[TrainConfig, arg(name="")] = field(default_factory=TrainConfig)
    resume: str | None = None
    """Folder of a run to go on with, exactly where it stopped, with its own configuration."""

    def run(self, terminal: Terminal) -> int:
        from retriever.trainer import Trainer

        if self.resume is not None:
            if self.file is not None or self.config != TrainConfig():
                raise ConfigError("--resume: a run goes on with its own configuration; give no file and no other flag")
            trainer = Trainer.resume(Path(self.resume), terminal)
        else:
            trainer = Trainer.start(self.config, terminal)
        try:
            model = trainer.train()
        except Interrupted as signal:
            terminal.line(
                f"{signal} at step {trainer.state.step}: checkpoint saved; "
                f"go on with: retriever train --resume {trainer.run}"
            )
            return 1
        best = trainer.state.best_score
        kept = "" if best is None else f" (step {trainer.state.best_step}, dev nDCG@10 {best:.4f})"
        terminal.line(f"model: {model}{kept}")
        return 0


@dataclass(frozen=True)
class Encode:
    """Embed a corpus into a sharded, checksummed store; run again after an interruption, it goes on."""

    model: str
    """Model folder or hub name."""
    data: Path
    """A BEIR folder (its corpus), or a .jsonl, .csv, .tsv (each also .gz) or .parquet file with columns _id (or id),
    text and, if you like, title."""
    out: Path
    """Folder of the store."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the vectors on disk."""
    shard_rows: int = 65536
    """Passages a shard; at most so many are lost when a run is killed."""
    precision: Precision = "fp32"
    """Arithmetic of the tower; bf16 and fp16 by autocast."""
    micro_batch_tokens: int | None = None
    """Tokens at once, padding included; empty: 4096 on a CPU, 16384 on a GPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes CUDA where there is one."""
    json: Switch = False
    """Print the summary as JSON."""

    def __post_init__(self) -> None:
        _check_counts(self, "shard_rows", "micro_batch_tokens")

    def run(self, terminal: Terminal) -> int:
        from eval.beir import beir_file
        from index.passages import read_passages
        from index.records import count_records
        from retriever.device import choose_device
        from retriever.encode import EncodeOptions, corpus_source, encode_passages
        from retriever.towers import load_towers

        corpus = beir_file(self.data, "corpus.jsonl") if self.data.is_dir() else self.data
        source = corpus_source(corpus)
        towers = load_towers(self.model, choose_device(self.device))
        total = count_records(corpus) if terminal.is_live else None
        with terminal.bar(f"encode {corpus.name}", total, "passages") as advance:
            store = encode_passages(
                towers,
                read_passages(corpus),
                self.out,
                EncodeOptions(self.precision, self.micro_batch_tokens),
                source=source,
                dtype=self.dtype,
                shard_rows=self.shard_rows,
                progress=advance,
            )
        _answer(self.json, {"store": str(self.out), "rows": store.rows, "dim": store.dim, "dtype": store.dtype})
        return 0


@dataclass(frozen=True)
class IndexBuild:
    """Build a FAISS index of an embedding store."""

    embeddings: Path
    """Folder that `retriever encode` wrote."""
    out: Path
    """Folder of the index."""
    factory: str = "auto"
    """FAISS factory string (Flat, SQfp16, IVF1024,Flat, HNSW32, OPQ32,IVF1024,PQ32x4fs …); auto chooses by size."""
    seed: int = 0
    """Of the sample of vectors that the index is trained on."""
    json: Switch = False
    """Print the summary as JSON."""

    def run(self, terminal: Terminal) -> int:
        from index import faiss_index
        from index.embeddings import EmbeddingStore
        from index.factory import choose, explain

        store = EmbeddingStore.open(self.embeddings)
        factory = self.factory
        if factory == "auto":
            factory = choose(store.rows, store.dim)
            terminal.line(explain(factory, store.rows, store.dim))
        with terminal.bar(f"index {factory}", store.rows, "vectors") as advance:
            faiss_index.build(store, self.out, factory=factory, seed=self.seed, progress=advance)
        _answer(self.json, {"index": str(self.out), "factory": factory, "rows": store.rows, "dim": store.dim})
        return 0


@dataclass(frozen=True)
class IndexVerify:
    """Check every file of an index or an embedding store against its checksum."""

    folder: Positional[Path]
    """The index or the store."""
    json: Switch = False
    """Print the summary as JSON."""

    def run(self, terminal: Terminal) -> int:
        from index.verify import verify

        _answer(self.json, dataclasses.asdict(verify(self.folder)))
        return 0


@dataclass(frozen=True)
class Search:
    """Find passages for queries: given as arguments, in a file, or one a line on standard input."""

    query: Positional[tuple[str, ...]]
    """The queries."""
    model: str
    """Model folder or hub name: the one that embedded the passages."""
    index: Path
    """Folder that `retriever index build` wrote."""
    queries: Path | None = None
    """A file of queries instead: .jsonl, .csv, .tsv or .parquet with _id (or id) and text."""
    k: int = 10
    """Passages a query."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes CUDA where there is one."""
    json: Switch = False
    """Print one JSON object a query."""

    def __post_init__(self) -> None:
        _check_counts(self, "k")
        if self.query and self.queries:
            raise ValueError("--queries: give queries as arguments or in a file, not both")

    def run(self, terminal: Terminal) -> int:
        from index.faiss_index import Index
        from retriever.device import choose_device
        from retriever.search import BATCH, search
        from retriever.towers import load_towers

        index = Index.open(self.index)
        towers = load_towers(self.model, choose_device(self.device))
        typed = not self.query and self.queries is None and sys.stdin.isatty()
        if typed:
            terminal.line("queries, one a line; Ctrl-D ends")
        for answer in search(towers, index, self._queries(), self.k, batch=1 if typed else BATCH):
            if self.json:
                print(json.dumps(dataclasses.asdict(answer), ensure_ascii=False), flush=True)
            else:
                _print_answer(answer)
        return 0

    def _queries(self) -> Iterator[tuple[str, str]]:
        """(id, text) of each query; those without an id are numbered."""
        from eval.beir import read_queries

        if self.queries:
            yield from read_queries(self.queries).items()
            return
        texts: Sequence[str] | Iterator[str] = self.query or (line.rstrip("\n") for line in sys.stdin)
        for number, text in enumerate(texts, start=1):
            if text.strip():
                yield str(number), text


@dataclass(frozen=True)
class EvaluateBeir:
    """Score a model on BEIR folders: nDCG, MAP, recall, precision and MRR, with run files and a report."""

    model: str
    """Model folder or hub name."""
    data: tuple[Path, ...]
    """BEIR folders."""
    out: Path
    """Folder of the report; embeddings found there are used again."""
    split: str = "test"
    """Which qrels."""
    k: int = 1000
    """Passages a query in the run."""
    precision: Precision = "fp32"
    """Arithmetic of the tower; bf16 and fp16 by autocast."""
    micro_batch_tokens: int | None = None
    """Tokens at once, padding included; empty: 4096 on a CPU, 16384 on a GPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes CUDA where there is one."""
    json: Switch = False
    """Print the means as JSON."""

    def __post_init__(self) -> None:
        _check_counts(self, "k", "micro_batch_tokens")
        if not self.data:
            raise ValueError("--data: expected at least one BEIR folder, found none")

    def run(self, terminal: Terminal) -> int:
        from eval.report import comparison_table
        from retriever.device import choose_device
        from retriever.encode import EncodeOptions
        from retriever.evaluate import evaluate_to_report
        from retriever.towers import load_towers

        towers = load_towers(self.model, choose_device(self.device))
        results = evaluate_to_report(
            towers,
            list(self.data),
            self.out,
            EncodeOptions(self.precision, self.micro_batch_tokens),
            terminal,
            split=self.split,
            k=self.k,
            details={"model": self.model},
        )
        if self.json:
            print(json.dumps({name: metrics.mean for name, metrics in results.items()}))
        else:
            print(comparison_table(results, head="data"), end="")
            terminal.line(f"report: {self.out / 'report.md'}")
        return 0


IndexCommand = Annotated[IndexBuild, subcommand("build")] | Annotated[IndexVerify, subcommand("verify")]
# tyro makes subcommands only of two types or more.
EvaluateCommand = Annotated[EvaluateBeir, subcommand("beir")] | Annotated[None, Suppress]


@dataclass(frozen=True)
class IndexGroup:
    """Build and verify indexes."""

    command: Annotated[IndexCommand, arg(name="")]

    def run(self, terminal: Terminal) -> int:
        return self.command.run(terminal)


@dataclass(frozen=True)
class EvaluateGroup:
    """Measure how well a model retrieves."""

    command: Annotated[EvaluateCommand, arg(name="")]

    def run(self, terminal: Terminal) -> int:
        assert self.command is not None
        return self.command.run(terminal)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 done, 1 failed, 2 bad arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _parse(arguments)
        with sigterm_interrupts(), Terminal() as terminal:
            code = command.run(terminal)
        # Here rather than at the interpreter's end, where a failure could no longer be answered.
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _fail(error, 2)
    except BrokenPipeError:
        # The reader of our output (head, less) has seen enough; what is left would fail again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, 1)
    except InputError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)


def _parse(arguments: list[str]) -> Any:
    file = _config_file(arguments)
    defaults = Train() if file is None else Train(file=file, config=load_config(Path(file)))
    commands = (
        Annotated[Train, subcommand("train", default=defaults)]
        | Annotated[Encode, subcommand("encode")]
        | Annotated[IndexGroup, subcommand("index")]
        | Annotated[Search, subcommand("search")]
        | Annotated[EvaluateGroup, subcommand("evaluate")]
    )
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            command: Any = tyro.cli(commands, prog="retriever", description=DESCRIPTION, args=arguments)
    except SystemExit as end:
        if end.code:
            raise ConfigError(_one_line(box.getvalue())) from None
        raise
    except ValueError as error:
        # A check of TrainConfig's own fields, which tyro lets through.
        raise ConfigError(str(error)) from None
    if isinstance(command, Train) and command.file != file:
        raise ConfigError(f"{command.file}: expected a configuration file, *.yaml, before any flag")
    return command


def _config_file(arguments: list[str]) -> str | None:
    """The configuration of `train`, needed before the flags are parsed, because it gives their defaults."""
    if arguments[:1] != ["train"]:
        return None
    names = (
        name
        for place, name in enumerate(arguments[1:])
        if not name.startswith("-") and (place == 0 or name.endswith((".yaml", ".yml")))
    )
    return next(names, None)


def _one_line(box: str) -> str:
    """What is said in the box that tyro draws around an error: the error, and the first thing it proposes."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    # The first row is a title. Where the output is not UTF-8, rules are made of hyphens and there are no corners.
    rows = " ".join(row.strip("╭╮│╰╯ ") for row in text.splitlines()[1:])
    sections = [" ".join(section.split()) for section in re.split(r"[─-]{3,}", rows) if section.strip()]
    # The checks of our own dataclasses name the flag themselves.
    message = re.sub(r"^Error parsing (\S+: (?=--|\S+: expected))?", "", sections[0])
    message = re.sub(r"invalid literal for int\(\) with base 10:", "expected a whole number, found", message)
    message = re.sub(r"could not convert string to float:", "expected a number, found", message)
    proposal = sections[1]
    if near := re.search(r"Perhaps you meant: .*?(--[\w.-]+)", proposal):
        return f"{message}; did you mean {near[1]}?"
    return f"{message}; {proposal}" if proposal.startswith("Available") else message


def _check_counts(command: Any, *names: str) -> None:
    for name in names:
        value = getattr(command, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")


def _fail(error: object, code: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"retriever: {text}", file=sys.stderr)
    return code


def _answer(as_json: bool, values: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(values))
    else:
        print("  ".join(f"{key} {value}" for key, value in values.items()))


def _print_answer(answer: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right", style="dim")
    table.add_column("score", justify="right")
    table.add_column("id", style="cyan", overflow="fold")
    table.add_column("passage", overflow="ellipsis", no_wrap=not sys.stdout.isatty())
    for result in answer.results:
        text = " ".join(f"{result.title} {result.text}".split())
        # Text, because a passage may hold what rich would take for markup.
        table.add_row(str(result.rank), f"{result.score:.4f}", Text(result.id), Text(text[:300]))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(answer.query, style="bold", markup=False, highlight=False)
    console.print(table)
