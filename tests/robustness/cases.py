"""A case: one file of an artifact is mutated and read, or a word of a command line is replaced."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

from children import Outcome, run_command
from further_readers import FURTHER_READERS
from mutations import TOKENS, mutate
from readers import READERS

from index.files import InputError
from index.manifest import NAME, FileEntry, read_manifest, write_manifest

ALL_READERS = READERS | FURTHER_READERS
# Files of a folder that no reader opens, or that only describe it to people.
NOT_READ = ("README.md", ".gitattributes", "recall.png", "state.txt", "plan.json")


def run_case(name: str, world: Path, scratch: Path, seed: int, case: int) -> Outcome:
    """Mutate one file of a copy of the artifact, and read the copy. Case 0 is not mutated, and must be read."""
    rng = random.Random(f"{seed} {case}")
    if name == "command line":
        return _run_words(rng, world, scratch)
    reader = ALL_READERS[name]
    source = world / reader.artifact
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
        ["score", "--model", world / "run/model", "--data", world / "mined.jsonl", "--out", "sc.jsonl", "--split", "x"],
        ["merge", "--models", world / "run/model", world / "plain_model", "--out", "g", "--weights", "1", "3"],
        ["study", world / "run.yaml", "--out", "t", "--batch-size", "8", "16", "--seeds", "1", "--dry-run"],
        ["index", "export", world / "store", "--to", "parquet", "--where", "x", "--batch", "7", "--name", "n"],
        ["index", "merge", world / "part1", world / "part2", "--out", "o"],
        ["index", "tune", world / "index", "--embeddings", world / "store", "--target-recall", "0.5", "--k", "3"],
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
