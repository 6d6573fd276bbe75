"""The commands: each is a dataclass whose fields are its flags and whose `run` does the work."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from index.files import InputError
from retriever.config import ConfigError, TrainConfig
from retriever.interrupt import Interrupted
from retriever.progress import Terminal

if TYPE_CHECKING:
    from retriever.encode import EncodeOptions
    from retriever.search import Answer
    from retriever.towers import Towers

Switch = Annotated[bool, FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What every command that embeds texts must know."""

    model: str
    """Model folder or hub name."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the tower; bf16 and fp16 by autocast."""
    micro_batch_tokens: int | None = None
    """Tokens at once, padding included; empty: 4096 on a CPU, 16384 on a GPU."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes CUDA where there is one."""
    json: Switch = False
    """Print the answer as JSON."""

    def __post_init__(self) -> None:
        check_counts(self, "micro_batch_tokens")

    def towers(self) -> Towers:
        """The model, in evaluation mode on the device."""
        from retriever.device import choose_device
        from retriever.towers import load_towers

        return load_towers(self.model, choose_device(self.device))

    def options(self) -> EncodeOptions:
        """How texts pass through it."""
        from retriever.encode import EncodeOptions

        return EncodeOptions(self.precision, self.micro_batch_tokens)


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


@dataclass(frozen=True, kw_only=True)
class Encode(Embedding):
    """Embed a corpus into a sharded, checksummed store; run again after an interruption, it goes on."""

    data: Path
    """A BEIR folder (its corpus), or a .jsonl, .csv, .tsv (each also .gz) or .parquet file with columns _id (or id),
    text and, if you like, title."""
    out: Path
    """Folder of the store."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the vectors on disk."""
    shard_rows: int = 65536
    """Passages a shard; at most so many are lost when a run is killed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "shard_rows")

    def run(self, terminal: Terminal) -> int:
        from eval.beir import beir_file
        from retriever.encode_files import embed_corpus

        corpus = beir_file(self.data, "corpus.jsonl") if self.data.is_dir() else self.data
        store = embed_corpus(
            self.towers(),
            corpus,
            self.out,
            self.options(),
            terminal,
            dtype=self.dtype,
            shard_rows=self.shard_rows,
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
            factory = choose(store.rows)
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


@dataclass(frozen=True, kw_only=True)
class Search(Embedding):
    """Find passages for queries: given as arguments, in a file, or one a line on standard input."""

    query: Positional[tuple[str, ...]]
    """The queries."""
    index: Path
    """Folder that `retriever index build` wrote."""
    queries: Path | None = None
    """A file of queries instead: .jsonl, .csv, .tsv or .parquet with _id (or id) and text."""
    k: int = 10
    """Passages a query."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "k")
        if self.query and self.queries:
            raise ValueError("--queries: give queries as arguments or in a file, not both")

    def run(self, terminal: Terminal) -> int:
        from index.faiss_index import Index
        from retriever.search import BATCH, search

        index = Index.open(self.index)
        towers = self.towers()
        typed = not self.query and self.queries is None and sys.stdin.isatty()
        if typed:
            terminal.line("queries, one a line; Ctrl-D ends")
        for answer in search(towers, index, self._queries(), self.k, self.options(), batch=1 if typed else BATCH):
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
        found = False
        for number, text in enumerate(texts, start=1):
            if text.strip():
                found = True
                yield str(number), text
        if not found:
            raise InputError("expected at least one query, found none")


@dataclass(frozen=True, kw_only=True)
class Mine(Embedding):
    """Find hard negatives for the queries of a BEIR folder; the file written is a training source as it is."""

    data: Path
    """BEIR folder."""
    out: Path
    """JSON lines file with query, positive and negatives."""
    embeddings: Path | None = None
    """Folder of the corpus's embeddings, continued or used again if there; empty for a temporary one."""
    split: str = "train"
    """Which qrels."""
    negatives: int = 7
    """Most negatives a query."""
    depth: int = 100
    """Candidates a query: its best-scoring passages."""
    max_share: float = 0.95
    """A candidate above this share of the best positive's score is taken for an unjudged positive and dropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "negatives", "depth")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"--max-share: expected more than 0 and at most 1, found {self.max_share}")

    def run(self, terminal: Terminal) -> int:
        from eval.beir import BeirDataset
        from retriever.mining import mine_with_towers

        written, short = mine_with_towers(
            self.towers(),
            BeirDataset.open(self.data, self.split),
            self.out,
            self.options(),
            terminal,
            embeddings=self.embeddings,
            negatives=self.negatives,
            depth=self.depth,
            max_share=self.max_share,
        )
        _answer(self.json, {"out": str(self.out), "queries": written, "with_fewer_negatives": short})
        return 0


@dataclass(frozen=True, kw_only=True)
class EvaluateBeir(Embedding):
    """Score a model on BEIR folders: nDCG, MAP, recall, precision and MRR, with run files and a report."""

    data: tuple[Path, ...]
    """BEIR folders."""
    out: Path
    """Folder of the report; embeddings found there are used again."""
    split: str = "test"
    """Which qrels."""
    k: int = 1000
    """Passages a query in the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "k")
        if not self.data:
            raise ValueError("--data: expected at least one BEIR folder, found none")

    def run(self, terminal: Terminal) -> int:
        from eval.report import comparison_table
        from retriever.evaluate import evaluate_to_report

        results = evaluate_to_report(
            self.towers(),
            list(self.data),
            self.out,
            self.options(),
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


def check_counts(command: Any, *names: str) -> None:
    """Refuse fields below 1 (ValueError, naming the flag)."""
    for name in names:
        value = getattr(command, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")


def _answer(as_json: bool, values: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(values))
    else:
        print("  ".join(f"{key} {value}" for key, value in values.items()))


def _print_answer(answer: Answer) -> None:
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
