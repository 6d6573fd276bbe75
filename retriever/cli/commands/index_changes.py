"""`retriever index merge`, `add`, `delete`, `export` and `verify`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from index.progress import Reporter
from retriever.cli.commands.common import Switch, answer


@dataclass(frozen=True, kw_only=True)
class IndexMerge:
    """Merge indexes that share their training (index build --train-from), for example the parts of one store in
    order."""

    indexes: Positional[tuple[Path, ...]]
    """The indexes, two or more."""
    out: Path
    """Folder of the merged index."""
    on_disk: Switch = False
    """Merge from file to file and leave the inverted lists on disk, which needs little memory."""
    json: Switch = False
    """Print the summary as JSON."""

    def __post_init__(self) -> None:
        if len(self.indexes) < 2:
            raise ValueError(f"indexes: expected two or more to merge, found {len(self.indexes)}")

    def run(self, reporter: Reporter) -> int:
        from index.ann.merge import merge
        from retriever.utils.check_progress import checksum_progress

        with checksum_progress(reporter, self.indexes) as checked, reporter.bar("merge", None, "vectors") as advance:
            rows = merge(self.indexes, self.out, on_disk=self.on_disk, progress=advance, checked=checked)
        answer(self.json, {"index": str(self.out), "rows": rows})
        return 0


@dataclass(frozen=True, kw_only=True)
class IndexAdd:
    """Add the passages of an embedding store to an index."""

    index: Positional[Path]
    """The index."""
    embeddings: Path
    """Folder of the embeddings of the new passages, from the same model."""
    out: Path | None = None
    """Folder of the new index. None: the old one is replaced."""
    json: Switch = False
    """Print the summary as JSON."""

    def run(self, reporter: Reporter) -> int:
        from index.ann.edit import add_passages
        from index.store.reader import EmbeddingStore
        from retriever.utils.check_progress import checksum_progress

        store = EmbeddingStore.open(self.embeddings)
        with (
            checksum_progress(reporter, [self.index, self.embeddings]) as checked,
            reporter.bar("add", store.rows, "vectors") as advance,
        ):
            added = add_passages(self.index, store, self.out, progress=advance, checked=checked)
        answer(self.json, {"index": str(self.out or self.index), "added": added})
        return 0


@dataclass(frozen=True, kw_only=True)
class IndexDelete:
    """Delete passages from an index by their ids."""

    index: Positional[Path]
    """The index."""
    ids: tuple[str, ...] = ()
    """Ids of the passages."""
    ids_file: Path | None = None
    """File of ids instead, one per line."""
    out: Path | None = None
    """Folder of the new index. None: the old one is replaced."""
    json: Switch = False
    """Print the summary as JSON."""

    def __post_init__(self) -> None:
        if bool(self.ids) == bool(self.ids_file):
            raise ValueError("--ids: expected ids, or a file of them by --ids-file; found both or neither")

    def run(self, reporter: Reporter) -> int:
        from index.ann.edit import delete_passages
        from index.passages import checked_id
        from index.records import read_lines
        from retriever.utils.check_progress import checksum_progress

        ids = list(self.ids)
        if self.ids_file is not None:
            lines = enumerate(read_lines(self.ids_file), start=1)
            ids = [checked_id(line.strip(), f"{self.ids_file}:{number}") for number, line in lines if line.strip()]
        with checksum_progress(reporter, [self.index]) as checked:
            deleted = delete_passages(self.index, ids, self.out, checked=checked)
        summary = {"index": str(self.out or self.index), "deleted": deleted, "not_there": len(set(ids)) - deleted}
        answer(self.json, summary)
        return 0


@dataclass(frozen=True, kw_only=True)
class IndexExport:
    """Write an embedding store to another engine, and compare rows and nearest neighbors there with the store.

    An interrupted command continues when it is repeated.
    """

    embeddings: Positional[Path]
    """Folder of `retriever encode`."""
    to: Literal["parquet", "qdrant", "lancedb", "milvus", "pgvector", "usearch"]
    """The engine. All but parquet need the extra of the same name."""
    where: str
    """Folder (parquet, lancedb, usearch, qdrant's local mode), file ending in .db (milvus), URL of a server (qdrant,
    milvus), or connection string (pgvector)."""
    name: str = "passages"
    """Name of the collection or table."""
    batch: int = 1000
    """Rows written at once."""
    json: Switch = False
    """Print the summary as JSON."""

    def run(self, reporter: Reporter) -> int:
        from index.store.reader import EmbeddingStore
        from retriever.errors import check_at_least
        from retriever.searching.export.export import export_store
        from retriever.utils.check_progress import checksum_progress

        check_at_least(1, batch=self.batch)
        store = EmbeddingStore.open(self.embeddings)
        with checksum_progress(reporter, [self.embeddings]) as checked:
            store.check(checked)
        with reporter.bar(f"export to {self.to}", store.rows, "vectors") as advance:
            rows = export_store(store, self.to, self.where, self.name, batch=self.batch, progress=advance)
        answer(self.json, {"engine": self.to, "name": self.name, "rows": rows})
        return 0


@dataclass(frozen=True)
class IndexVerify:
    """Check every file of an index or an embedding store against its checksum."""

    folder: Positional[Path]
    """The index or the store."""
    json: Switch = False
    """Print the summary as JSON."""

    def run(self, reporter: Reporter) -> int:
        from index.verify import verify
        from retriever.utils.check_progress import checksum_progress

        with checksum_progress(reporter, [self.folder]) as checked:
            found = verify(self.folder, checked)
        answer(self.json, dataclasses.asdict(found))
        return 0
