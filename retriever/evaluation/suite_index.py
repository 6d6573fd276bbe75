"""The approximate index of an evaluation: a given one, or one that is built for each corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.sets.plan import Task
from index.ann.build import build, choose_for
from index.ann.factory import import_faiss, make
from index.ann.index import Index
from index.files import InputError
from index.manifest import INDEX, NAME, read_manifest
from index.progress import Reporter
from index.store.reader import EmbeddingStore
from retriever.models.towers import Towers
from retriever.utils.check_progress import checksum_progress


def check_one_set(folder: Path, tasks: Sequence[Task]) -> Task:
    """The only set of the evaluation, which a given index belongs to.

    Raises:
        InputError: there are several sets.
    """
    if len(tasks) != 1:
        raise InputError(f"{folder}: expected one set to go with one index, found {len(tasks)}")
    return tasks[0]


def open_index(folder: Path, towers: Towers, reporter: Reporter | None) -> Index:
    """Open a given index before hours of encoding.

    Args:
        folder: the index.
        towers: the model, which must have embedded its passages.
        reporter: shows the check of the files; None: they are not checked, on ranks that do not search.

    Raises:
        InputError: there is no such index, it is damaged, or it belongs to another model.
    """
    index = Index(read_manifest(folder, INDEX))
    index.check_model(towers.fingerprint())
    if reporter is not None:
        with checksum_progress(reporter, [folder]) as checked:
            index.check(checked)
    return index


def check_factory(factory: str, dim: int) -> None:
    """Refuse a factory string that faiss cannot use before hours of encoding.

    Raises:
        InputError: faiss is not installed, or cannot make such an index of vectors of `dim` values.
    """
    import_faiss()
    if factory != "auto":
        make(factory, dim)


def build_or_reuse_index(store: EmbeddingStore, folder: Path, factory: str, name: str, reporter: Reporter) -> Index:
    """Build the index of a store; an existing index of the same store is verified and reused.

    Args:
        store: the embeddings.
        folder: folder of the index.
        factory: faiss factory string, or "auto".
        name: name of the set, for the progress.
        reporter: shows the progress.
    """
    if factory == "auto":
        factory = choose_for(store, None)
    if (folder / NAME).exists():
        fields = read_manifest(folder, INDEX).fields
        wanted = {"rows": store.rows, "dim": store.dim, "model": store.model, "source": store.source}
        if all(fields.get(field) == value for field, value in {**wanted, "factory": factory}.items()):
            with checksum_progress(reporter, [folder]) as checked:
                return Index.open(folder, verify="hash", progress=checked)
    with reporter.bar(f"{name}: index {factory}", store.rows, "vectors") as advance:
        build(store, folder, factory=factory, progress=advance)
    return Index.open(folder)
