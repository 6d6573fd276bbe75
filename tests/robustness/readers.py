"""Every reader, with the artifact that it reads and how a mutated one is given to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from children import Outcome, run_command, run_function

from eval.runs import read_trec_run
from eval.zero_shot.opening import open_set
from index.beir import BeirDataset, read_qrels, read_queries
from index.files import InputError
from index.passages import read_passages
from retriever.cli.terminal import Terminal
from retriever.config.images import ImageSource
from retriever.config.sources import SourceConfig
from retriever.data.images.sources import BrokenPairError, open_pairs
from retriever.data.sources import Notices, read_examples
from retriever.data.table import open_source
from retriever.models.images.transforms import open_image
from retriever.training.checkpoint import load_checkpoint
from retriever.training.tracking.run_log import RunLog
from retriever.training.train import TrainingRun
from retriever.training.trainer import Trainer


@dataclass(frozen=True)
class Reader:
    """A reader and its input.

    Attributes:
        artifact: the file or folder in the folder of artifacts.
        read: gets the path of the mutated copy and the folder of artifacts.
        sealed: checksums cover the artifact, so that every change must be refused.
        editable: pattern of the names of files that may be changed nevertheless.
        reseal: the checksums are computed again after the mutation, so that the content itself is read.
        weight: how often it is drawn.
        needs: further artifacts that are built for it (further.py).
    """

    artifact: str
    read: Callable[[Path, Path], Outcome]
    sealed: bool = False
    editable: str = ""
    reseal: bool = False
    weight: float = 1.0
    needs: tuple[str, ...] = ()


def function(read: Callable[[Path], object]) -> Callable[[Path, Path], Outcome]:
    """Call a function with the path of the mutated artifact."""
    return lambda path, world: run_function(lambda: read(path))


def command(*words: str) -> Callable[[Path, Path], Outcome]:
    """Run a command; PATH is the mutated artifact, OUT a new path, and @NAME another artifact."""

    def read(path: Path, world: Path) -> Outcome:
        places = {"PATH": path, "OUT": path.parent / "out", "OUT.jsonl": path.parent / "out.jsonl"}
        return run_command([world / word[1:] if word[0] == "@" else places.get(word, word) for word in words])

    return read


def _pairs(path: Path) -> None:
    table = open_source(
        SourceConfig(str(path), query="question", positive="answer", negatives="wrong"), path.parent / "cache"
    )
    for row in range(len(table)):
        table[row]


def _examples(path: Path) -> None:
    for _ in read_examples(SourceConfig(str(path), query="question", positive="answer", negatives="wrong"), Notices()):
        pass


def _beir(path: Path) -> None:
    dataset = BeirDataset.open(path)
    dataset.check({passage.id for passage in dataset.passages()})


def _image_pairs(path: Path) -> None:
    pairs = open_pairs(ImageSource(str(path)), path.parent / "cache")
    pairs.images_sha256()
    for row in range(len(pairs)):
        try:
            pairs.read(row).open()
        except BrokenPairError as error:
            assert "\n" not in str(error)


def _image_set(path: Path) -> None:
    for sample in open_set(path).samples:
        try:
            open_image(sample.image.read(), sample.image.name)
        except InputError as error:
            assert "\n" not in str(error)


def _metrics(path: Path) -> None:
    assert all(isinstance(row, dict) for row in TrainingRun(path.parent, 1).metrics)
    RunLog(path.parent, step=3, dev_step=3).close()


@cache
def _trainer(run: Path) -> Trainer:
    return Trainer.resume(run, Terminal())


def _checkpoint(path: Path, world: Path) -> Outcome:
    parts = _trainer(world / "run").components
    return run_function(lambda: load_checkpoint(path, parts.modules, parts.optimizer))


def _resumed(path: Path, world: Path) -> Outcome:
    return run_command(["train", "--resume", path])


READERS: dict[str, Reader] = {
    "configuration": Reader("run.yaml", command("train", "PATH", "--dry-run"), weight=3),
    "pairs jsonl": Reader("pairs.jsonl", function(_pairs)),
    "pairs jsonl.gz": Reader("pairs.jsonl.gz", function(_pairs)),
    "pairs csv": Reader("pairs.csv", function(_pairs)),
    "pairs tsv": Reader("pairs.tsv", function(_pairs)),
    "pairs parquet": Reader("pairs.parquet", function(_pairs)),
    "corpus jsonl": Reader("beir/corpus.jsonl", function(lambda path: sum(1 for _ in read_passages(path)))),
    "corpus parquet": Reader("corpus.parquet", function(lambda path: sum(1 for _ in read_passages(path)))),
    "queries": Reader("beir/queries.jsonl", function(read_queries)),
    "queries gz": Reader("queries.jsonl.gz", function(read_queries)),
    "qrels": Reader("beir/qrels/test.tsv", function(read_qrels), weight=2),
    "qrels gz": Reader("test.tsv.gz", function(read_qrels)),
    "run": Reader("system.run", function(read_trec_run), weight=2),
    "BEIR folder": Reader("beir", function(_beir)),
    "encoded corpus": Reader(
        "beir/corpus.jsonl", command("encode", "--model", "@run/model", "--data", "PATH", "--out", "OUT"), weight=0.3
    ),
    "evaluated run": Reader(
        "system.run", command("evaluate", "run", "PATH", "--data", "@beir", "--out", "OUT"), weight=0.3
    ),
    "split": Reader(
        "pairs.jsonl",
        command("split", "--data", "PATH", "--out", "OUT", "--query", "question", "--positive", "answer"),
        weight=0.3,
    ),
    "store": Reader("store", command("index", "verify", "PATH"), sealed=True),
    "resealed store": Reader(
        "store", command("index", "build", "--embeddings", "PATH", "--out", "OUT", "--factory", "Flat"), reseal=True
    ),
    "index": Reader("index", command("index", "verify", "PATH"), sealed=True),
    "resealed index": Reader("index", command("search", "--model", "@run/model", "--index", "PATH", "q"), reseal=True),
    "resealed graph": Reader(
        "index_pq", command("search", "--model", "@run/model", "--index", "PATH", "q"), reseal=True
    ),
    "checkpoint": Reader("run/checkpoints/step-00000006", _checkpoint, sealed=True),
    "resealed checkpoint": Reader("run/checkpoints/step-00000006", _checkpoint, reseal=True, weight=2),
    "resumed run": Reader("run", _resumed, weight=0.2),
    "model": Reader(
        "run/model",
        command("encode", "--model", "PATH", "--data", "@beir/corpus.jsonl", "--out", "OUT"),
        sealed=True,
        editable=r".*config\.json|config.*\.json|modules\.json|special_tokens_map\.json|retriever\.sha256",
    ),
    "model without sums": Reader(
        "plain_model",
        command("encode", "--model", "PATH", "--data", "@beir/corpus.jsonl", "--out", "OUT"),
        weight=2,
    ),
    "saved dataset": Reader("saved", function(_examples)),
    "saved splits": Reader("saved_dict", function(_examples)),
    "dataset folder": Reader("hub", function(_examples), weight=0.5),
    "tar": Reader("tars", function(_image_pairs), weight=2),
    "image table jsonl": Reader("images.jsonl", function(_image_pairs)),
    "image table csv": Reader("images.csv", function(_image_pairs)),
    "image set table": Reader("labels.jsonl", function(_image_set)),
    "image set tars": Reader("image_set", function(_image_set)),
    "image set folder": Reader("classes", function(_image_set), weight=0.3),
    "metrics": Reader("run/metrics.jsonl", function(_metrics)),
    **{
        f"image {name}": Reader(f"images/{name}", function(open_image))
        for name in ("image.png", "image.jpeg", "image.webp", "image.gif", "image.bmp", "image.tiff", "palette.png")
    },
}
