"""The engines that a store can be written to, behind one interface."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from index.files import InputError, atomic_path
from index.passages import Passage

NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")


class Engine(ABC):
    """A collection of vectors with ids and passages in another engine. Rows keep their numbers.

    Args:
        where: folder or address.
        name: name of the collection or table.
        dim: D, the length of a vector.
    """

    extra = ""
    """The extra of this package with the engine's client."""

    def __init__(self, where: str, name: str, dim: int) -> None:
        if not NAME.fullmatch(name):
            raise InputError(f"name: expected small letters, digits and _, found {name!r:.60}")
        self.where, self.name, self.dim = where, name, dim
        try:
            self._open()
        except ImportError as error:
            raise InputError(
                f'{type(self).__name__.lower()} needs {error.name}: pip install "dense-retriever[{self.extra}]"'
            ) from None

    @abstractmethod
    def _open(self) -> None:
        """Connect, and create the collection if it is missing."""

    @abstractmethod
    def rows(self) -> int:
        """Number of rows there."""

    @abstractmethod
    def first_id(self) -> str | None:
        """The id of row 0; None if there is none."""

    @abstractmethod
    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        """Write the rows from `first` on, also over rows of an interrupted run; vectors [n, D] float32."""

    @abstractmethod
    def search(self, queries: np.ndarray, k: int) -> list[list[int]]:
        """The k nearest rows of each query [Q, D] by inner product, exactly, best first."""

    @abstractmethod
    def close(self) -> None:
        """Disconnect."""


class Parquet(Engine):
    """Parquet files in a folder, one for each batch, in the columns row, id, title, text, fields (JSON) and vector."""

    def _open(self) -> None:
        self._folder = Path(self.where) / self.name
        self._folder.mkdir(parents=True, exist_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.parquet"))

    def rows(self) -> int:
        from pyarrow import parquet

        return sum(parquet.read_metadata(path).num_rows for path in self._files())

    def first_id(self) -> str | None:
        from pyarrow import parquet

        files = self._files()
        return str(parquet.read_table(files[0], columns=["id"])["id"][0]) if files else None

    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        import pyarrow
        from pyarrow import parquet

        values = pyarrow.array(np.ascontiguousarray(vectors).reshape(-1), pyarrow.float32())
        columns = {
            "row": pyarrow.array(range(first, first + len(passages)), pyarrow.int64()),
            **{name: [getattr(passage, name) for passage in passages] for name in ("id", "title", "text")},
            "fields": [json.dumps(dict(passage.fields), ensure_ascii=False) for passage in passages],
            "vector": pyarrow.FixedSizeListArray.from_arrays(values, self.dim),
        }
        with atomic_path(self._folder / f"{first:012d}.parquet") as path:
            parquet.write_table(pyarrow.table(columns), path)

    def search(self, queries: np.ndarray, k: int) -> list[list[int]]:
        from pyarrow import parquet

        found: list[list[tuple[float, int]]] = [[] for _ in queries]
        for path in self._files():
            table = parquet.read_table(path, columns=["row", "vector"])
            vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self.dim)
            rows = table["row"].to_numpy()
            for number, products in enumerate(queries @ vectors.T):
                best = np.argsort(-products)[:k]
                pairs = [*found[number], *zip((-products[best]).tolist(), rows[best].tolist(), strict=True)]
                found[number] = sorted(pairs)[:k]
        return [[row for _, row in one] for one in found]

    def close(self) -> None:
        # Every file was closed after it was written.
        del self._folder


class Qdrant(Engine):
    """Qdrant: a folder (local mode), or the URL of a server."""

    extra = "qdrant"

    def _open(self) -> None:
        from qdrant_client import QdrantClient, models

        remote = self.where.startswith(("http://", "https://"))
        self._client = QdrantClient(url=self.where) if remote else QdrantClient(path=self.where)
        if not self._client.collection_exists(self.name):
            parameters = models.VectorParams(size=self.dim, distance=models.Distance.DOT)
            self._client.create_collection(self.name, vectors_config=parameters)

    def rows(self) -> int:
        return int(self._client.count(self.name, exact=True).count)

    def first_id(self) -> str | None:
        found = self._client.retrieve(self.name, [0])
        return str((found[0].payload or {}).get("id")) if found else None

    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        from qdrant_client import models

        rows = list(range(first, first + len(passages)))
        payloads: list[dict[str, Any]] = [payload_of(passage) for passage in passages]
        batch = models.Batch(ids=list(rows), vectors=vectors.tolist(), payloads=payloads)
        self._client.upsert(self.name, batch, wait=True)

    def search(self, queries: np.ndarray, k: int) -> list[list[int]]:
        from qdrant_client import models

        exact = models.SearchParams(exact=True)
        found = [
            self._client.query_points(self.name, query=query.tolist(), limit=k, search_params=exact)
            for query in queries
        ]
        return [[int(point.id) for point in each.points] for each in found]

    def close(self) -> None:
        self._client.close()


class Lancedb(Engine):
    """LanceDB: a folder or an object store's address."""

    extra = "lancedb"

    def _open(self) -> None:
        import lancedb
        import pyarrow

        schema = pyarrow.schema(
            [
                ("row", pyarrow.int64()),
                ("id", pyarrow.string()),
                ("title", pyarrow.string()),
                ("text", pyarrow.string()),
                ("vector", pyarrow.list_(pyarrow.float32(), self.dim)),
            ]
        )
        self._table = lancedb.connect(self.where).create_table(self.name, schema=schema, exist_ok=True)

    def rows(self) -> int:
        return int(self._table.count_rows())

    def first_id(self) -> str | None:
        found = self._table.search().where("row = 0").limit(1).to_list()
        return str(found[0]["id"]) if found else None

    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        rows = [
            {"row": row, "id": each.id, "title": each.title, "text": each.text, "vector": vector}
            for row, (each, vector) in enumerate(zip(passages, vectors.tolist(), strict=True), start=first)
        ]
        if self._table.count_rows(f"row >= {first}"):
            self._table.delete(f"row >= {first}")
        self._table.add(rows)

    def search(self, queries: np.ndarray, k: int) -> list[list[int]]:
        searches: list[Any] = [self._table.search(query) for query in queries]
        found = [each.distance_type("dot").limit(k).to_list() for each in searches]
        return [[int(each["row"]) for each in one] for one in found]

    def close(self) -> None:
        # The table holds no connection: every call opens what it reads.
        del self._table


class Milvus(Engine):
    """Milvus: a file whose name ends in .db (Milvus Lite), or the URL of a server."""

    extra = "milvus"

    def _open(self) -> None:
        from pymilvus import DataType, MilvusClient

        self._client = MilvusClient(self.where)
        if not self._client.has_collection(self.name):
            schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True)
            schema.add_field("row", DataType.INT64, is_primary=True)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self.dim)
            index = self._client.prepare_index_params()
            index.add_index("vector", index_type="FLAT", metric_type="IP")
            self._client.create_collection(self.name, schema=schema, index_params=index, consistency_level="Strong")
        self._client.load_collection(self.name)

    def rows(self) -> int:
        return int(self._client.query(self.name, output_fields=["count(*)"])[0]["count(*)"])

    def first_id(self) -> str | None:
        found = self._client.get(self.name, ids=[0], output_fields=["id"])
        return str(found[0]["id"]) if found else None

    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        rows = [
            {"row": row, "vector": vector, **payload_of(passage)}
            for row, (passage, vector) in enumerate(zip(passages, vectors.tolist(), strict=True), start=first)
        ]
        self._client.upsert(self.name, rows)

    def search(self, queries: np.ndarray, k: int) -> list[list[int]]:
        found = self._client.search(self.name, data=queries.tolist(), limit=k, search_params={"metric_type": "IP"})
        return [[int(hit["row"]) for hit in hits] for hits in found]

    def close(self) -> None:
        self._client.close()


class Pgvector(Engine):
    """PostgreSQL with the extension pgvector: a connection string."""

    extra = "pgvector"

    def _open(self) -> None:
        import psycopg
        from pgvector.psycopg import register_vector

        try:
            self._connection = psycopg.connect(self.where, autocommit=True)
            self._connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except psycopg.Error as error:
            raise InputError(f"PostgreSQL: {str(error).splitlines()[0]:.200}") from None
        register_vector(self._connection)
        self._run(
            "CREATE TABLE IF NOT EXISTS {} (row bigint PRIMARY KEY, id text NOT NULL, title text, text text, "
            f"fields jsonb, embedding vector({self.dim}))"
        )

    def _run(self, query: str, values: Sequence[Any] = ()) -> Any:
        from psycopg import sql

        return self._connection.execute(sql.SQL(query).format(sql.Identifier(self.name)), values)

    def rows(self) -> int:
        return int(self._run("SELECT count(*) FROM {}").fetchone()[0])

    def first_id(self) -> str | None:
        found = self._run("SELECT id FROM {} WHERE row = 0").fetchone()
        return None if found is None else str(found[0])

    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        from psycopg import sql
        from psycopg.types.json import Jsonb

        statement = "COPY {} (row, id, title, text, fields, embedding) FROM STDIN WITH (FORMAT BINARY)"
        with self._connection.transaction(), self._connection.cursor() as cursor:
            self._run("DELETE FROM {} WHERE row >= %s", [first])
            with cursor.copy(sql.SQL(statement).format(sql.Identifier(self.name))) as copy:
                copy.set_types(["int8", "text", "text", "text", "jsonb", "vector"])
                for row, (passage, vector) in enumerate(zip(passages, vectors, strict=True), start=first):
                    # PostgreSQL's texts cannot hold NUL.
                    texts = [text.replace("\0", "\ufffd") for text in (passage.id, passage.title, passage.text)]
                    copy.write_row([row, *texts, Jsonb(dict(passage.fields)), vector])

    def search(self, queries: np.ndarray, k: int) -> list[list[int]]:
        statement = "SELECT row FROM {} ORDER BY embedding <#> %s LIMIT %s"
        return [[int(row) for (row,) in self._run(statement, [query, k]).fetchall()] for query in queries]

    def close(self) -> None:
        self._connection.close()


def payload_of(passage: Passage) -> dict[str, Any]:
    """What engines of documents keep with a vector."""
    return {"id": passage.id, "title": passage.title, "text": passage.text, **passage.fields}


ENGINES: dict[str, type[Engine]] = {
    "parquet": Parquet,
    "qdrant": Qdrant,
    "lancedb": Lancedb,
    "milvus": Milvus,
    "pgvector": Pgvector,
}
