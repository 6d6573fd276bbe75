"""Every reader, with the artefact that it reads and how a mutated one is given to it."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from children import Outcome, run_command, run_function
from mutations import TOKENS, mutate

from eval.runs import read_trec_run
from eval.zero_shot.opening import open_set
from index.beir import BeirDataset, read_qrels, read_queries
from index.files import InputError
from index.manifest import NAME, FileEntry, read_manifest, write_manifest
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
        artefact: the file or folder in the folder of artefacts.
        read: gets the path of the mutated copy and the folder of artefacts.
        sealed: checksums cover the artefact, so that every change must be refused.
        editable: pattern of the names of files that may be changed nevertheless.
        reseal: the checksums are computed again after the mutation, so that the content itself is read.
        weight: how often it is drawn.
    """

    artefact: str
    read: Callable[[Path, Path], Outcome]
    sealed: bool = False
    editable: str = ""
    reseal: bool = False
    weight: float = 1.0


def _function(function: Callable[[Path], object]) -> Callable[[Path, Path], Outcome]:
    return lambda path, world: run_function(lambda: function(path))


def _command(*words: str) -> Callable[[Path, Path], Outcome]:
    """Run a command; PATH is the mutated artefact, OUT a new path, and @NAME another artefact."""

    def read(path: Path, world: Path) -> Outcome:
        places = {"PATH": path, "OUT": path.parent / "out"}
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
    "configuration": Reader("run.yaml", _command("train", "PATH", "--dry-run"), weight=3),
    "pairs jsonl": Reader("pairs.jsonl", _function(_pairs)),
    "pairs jsonl.gz": Reader("pairs.jsonl.gz", _function(_pairs)),
    "pairs csv": Reader("pairs.csv", _function(_pairs)),
    "pairs tsv": Reader("pairs.tsv", _function(_pairs)),
    "pairs parquet": Reader("pairs.parquet", _function(_pairs)),
    "corpus jsonl": Reader("beir/corpus.jsonl", _function(lambda path: sum(1 for _ in read_passages(path)))),
    "corpus parquet": Reader("corpus.parquet", _function(lambda path: sum(1 for _ in read_passages(path)))),
    "queries": Reader("beir/queries.jsonl", _function(read_queries)),
    "queries gz": Reader("queries.jsonl.gz", _function(read_queries)),
    "qrels": Reader("beir/qrels/test.tsv", _function(read_qrels), weight=2),
    "qrels gz": Reader("test.tsv.gz", _function(read_qrels)),
    "run": Reader("system.run", _function(read_trec_run), weight=2),
    "BEIR folder": Reader("beir", _function(_beir)),
    "encoded corpus": Reader(
        "beir/corpus.jsonl", _command("encode", "--model", "@run/model", "--data", "PATH", "--out", "OUT"), weight=0.3
    ),
    "evaluated run": Reader(
        "system.run", _command("evaluate", "run", "PATH", "--data", "@beir", "--out", "OUT"), weight=0.3
    ),
    "split": Reader(
        "pairs.jsonl",
        _command("split", "--data", "PATH", "--out", "OUT", "--query", "question", "--positive", "answer"),
        weight=0.3,
    ),
    "store": Reader("store", _command("index", "verify", "PATH"), sealed=True),
    "resealed store": Reader(
        "store", _command("index", "build", "--embeddings", "PATH", "--out", "OUT", "--factory", "Flat"), reseal=True
    ),
    "index": Reader("index", _command("index", "verify", "PATH"), sealed=True),
    "resealed index": Reader("index", _command("search", "--model", "@run/model", "--index", "PATH", "q"), reseal=True),
    "resealed graph": Reader(
        "index_pq", _command("search", "--model", "@run/model", "--index", "PATH", "q"), reseal=True
    ),
    "checkpoint": Reader("run/checkpoints/step-00000006", _checkpoint, sealed=True),
    "resealed checkpoint": Reader("run/checkpoints/step-00000006", _checkpoint, reseal=True, weight=2),
    "resumed run": Reader("run", _resumed, weight=0.5),
    "model": Reader(
        "run/model",
        _command("encode", "--model", "PATH", "--data", "@beir/corpus.jsonl", "--out", "OUT"),
        sealed=True,
        editable=r".*config\.json|config.*\.json|modules\.json|special_tokens_map\.json|retriever\.sha256",
    ),
    "model without sums": Reader(
        "plain_model",
        _command("encode", "--model", "PATH", "--data", "@beir/corpus.jsonl", "--out", "OUT"),
        weight=2,
    ),
    "saved dataset": Reader("saved", _function(_examples)),
    "saved splits": Reader("saved_dict", _function(_examples)),
    "dataset folder": Reader("hub", _function(_examples), weight=0.5),
    "tar": Reader("tars", _function(_image_pairs), weight=2),
    "image table jsonl": Reader("images.jsonl", _function(_image_pairs)),
    "image table csv": Reader("images.csv", _function(_image_pairs)),
    "image set table": Reader("labels.jsonl", _function(_image_set)),
    "image set tars": Reader("image_set", _function(_image_set)),
    "image set folder": Reader("classes", _function(_image_set), weight=0.3),
    "metrics": Reader("run/metrics.jsonl", _function(_metrics)),
    **{
        f"image {name}": Reader(f"images/{name}", _function(open_image))
        for name in ("image.png", "image.jpeg", "image.webp", "image.gif", "image.bmp", "image.tiff", "palette.png")
    },
}
# Files of a folder that no reader opens, or that only describe it to people.
NOT_READ = ("README.md", ".gitattributes", "recall.png", "state.txt", "plan.json")


def run_case(name: str, world: Path, scratch: Path, seed: int, case: int) -> Outcome:
    """Mutate one file of a copy of the artefact, and read the copy. Case 0 is not mutated, and must be read."""
    rng = random.Random(f"{seed} {case}")
    if name == "command line":
        return _run_words(rng, world, scratch)
    reader = READERS[name]
    source = world / reader.artefact
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    path = scratch / source.name
    if source.is_dir():
        shutil.copytree(source, path)
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in NOT_READ)
        file = rng.choice(files)
    else:
        if name.startswith(("image table", "image set")):
            (scratch / "images").symlink_to(world / "images")
        shutil.copy(source, path)
        file = path
    before = file.read_bytes()
    removed = bool(case) and path.is_dir() and rng.random() < 0.05
    if removed:
        file.unlink()
    elif case:
        file.write_bytes(mutate(before, file.name, rng))
    if reader.reseal:
        _reseal(path)
    outcome = reader.read(path, world)
    changed = removed or not file.exists() or file.read_bytes() != before
    if not case and outcome.kind == "refused":
        return Outcome("not read", outcome.detail)
    sealed = reader.sealed and not re.fullmatch(reader.editable, file.name)
    if sealed and changed and outcome.kind == "ok":
        return Outcome("accepted", f"{file.relative_to(path)} was changed")
    return outcome


def _reseal(folder: Path) -> None:
    """Write a manifest with the right sums of changed files."""
    try:
        manifest = read_manifest(folder)
    except InputError:
        # The manifest itself is damaged.
        return
    files = {file: FileEntry.of(folder / file) for file in manifest.files if (folder / file).is_file()}
    write_manifest(dataclasses.replace(manifest, files={**manifest.files, **files}))
    assert (folder / NAME).exists()


def _run_words(rng: random.Random, world: Path, scratch: Path) -> Outcome:
    """Run a command line with one word replaced, removed or added."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    os.chdir(scratch)
    lines: tuple[list[Any], ...] = (
        ["train", world / "run.yaml", "--dry-run", "--optim.lr", "1e-3", "--steps", "3", "--data.negatives", "1"],
        ["encode", "--model", world / "run/model", "--data", world / "beir", "--out", "e", "--shard-rows", "8"],
        ["index", "build", "--embeddings", world / "store", "--out", "i", "--factory", "IVF2,Flat", "--seed", "1"],
        ["index", "verify", world / "index"],
        ["index", "delete", world / "index", "--ids", "d1", "--out", "o"],
        ["search", "--model", world / "run/model", "--index", world / "index", "--k", "3", "a query"],
        ["mine", "--model", world / "run/model", "--data", world / "beir", "--out", "m.jsonl", "--depth", "5"],
        ["evaluate", "run", world / "system.run", "--data", world / "beir", "--out", "r", "--k", "10"],
        ["split", "--data", world / "pairs.jsonl", "--out", "s", "--query", "question", "--positive", "answer"],
    )
    words = [str(word) for word in rng.choice(lines)]
    value = rng.choice(
        [token.decode("utf-8", "surrogateescape").replace("\0", "") for token in TOKENS]
        + [
            "-1",
            "0",
            "nan",
            "inf",
            "1e308",
            str(2**31),
            str(2**63),
            str(10**30),
            "",
            "true",
            "--k",
            "/dev/zero",
            "/",
            ".",
        ]
    )
    at = rng.randrange(1, len(words))
    kind = rng.random()
    if kind < 0.7:
        words[at] = value
    elif kind < 0.85:
        del words[at]
    else:
        words.insert(at, value)
    return run_command(words)
