"""Exports to databases: Qdrant, LanceDB, Milvus, and PostgreSQL with pgvector."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

import numpy as np

from index.files import InputError
from index.passages import Passage
from retriever.searching.export.engine import Engine, passage_of, payload_of
from retriever.searching.export.files import table_of


class Qdrant(Engine):
    """Qdrant: a folder (local mode), or the URL of a server."""

    extra = "qdrant"

    def errors(self) -> tuple[type[Exception], ...]:
        from qdrant_client.common.client_exceptions import QdrantException
        from qdrant_client.http.exceptions import ApiException

        # The local mode raises Python's own.
        return ApiException, QdrantException, RuntimeError, ValueError, sqlite3.Error

    def _open(self) -> None:
        from qdrant_client import QdrantClient, models

        self._remote = self.where.startswith(("http://", "https://"))
        self._client = QdrantClient(url=self.where) if self._remote else QdrantClient(path=self.where)
        if not self._client.collection_exists(self.name):
            parameters = models.VectorParams(size=self.dim, distance=models.Distance.DOT)
            self._client.create_collection(self.name, vectors_config=parameters)

    def rows(self) -> int:
        return int(self._client.count(self.name, exact=True).count)

    def passages(self, rows: Sequence[int]) -> list[Passage]:
        found = {point.id: point.payload or {} for point in self._client.retrieve(self.name, list(rows))}
        return [passage_of(found[row]) for row in rows if row in found]

    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        from qdrant_client import models

        rows = list(range(first, first + len(passages)))
        payloads: list[dict[str, Any]] = [payload_of(passage) for passage in passages]
        batch = models.Batch(ids=list(rows), vectors=vectors.tolist(), payloads=payloads)
        self._client.upsert(self.name, batch, wait=True)

    def search(self, queries: np.ndarray, k: int) -> list[list[int]]:
        from qdrant_client import models

        # The local mode is exact in any case.
        exact = models.SearchParams(exact=True) if self._remote else None
        found = [
            self._client.query_points(self.name, query=query.tolist(), limit=k, search_params=exact)
            for query in queries
        ]
        return [[int(point.id) for point in each.points] for each in found]

    def close(self) -> None:
        self._client.close()


class Lancedb(Engine):
    """LanceDB: a folder or an object store's address. The fields are a column of JSON."""

    extra = "lancedb"

    def errors(self) -> tuple[type[Exception], ...]:
        return OSError, RuntimeError, ValueError

    def _open(self) -> None:
        import lancedb
        import pyarrow

        schema = pyarrow.schema(
            [
                ("row", pyarrow.int64()),
                ("id", pyarrow.string()),
                ("title", pyarrow.string()),
                ("text", pyarrow.string()),
                ("fields", pyarrow.json_()),
                ("vector", pyarrow.list_(pyarrow.float32(), self.dim)),
            ]
        )
        connection = lancedb.connect(self.where)
        try:
            self._table = connection.open_table(self.name)
        except ValueError:
            self._table = connection.create_table(self.name, schema=schema)

    def rows(self) -> int:
        return int(self._table.count_rows())

    def passages(self, rows: Sequence[int]) -> list[Passage]:
        asked = self._table.search().where(f"row IN ({', '.join(map(str, rows))})").limit(len(rows))
        found = {each["row"]: each for each in asked.select(["row", "id", "title", "text", "fields"]).to_list()}
        return [
            Passage(each["id"], each["title"], each["text"], json.loads(each["fields"]))
            for each in (found[row] for row in rows if row in found)
        ]

    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        import pyarrow

        table = table_of(first, passages, vectors)
        position = table.column_names.index("fields")
        table = table.set_column(position, "fields", table["fields"].cast(pyarrow.json_()))
        if self._table.count_rows(f"row >= {first}"):
            self._table.delete(f"row >= {first}")
        self._table.add(table)

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

    def errors(self) -> tuple[type[Exception], ...]:
        from pymilvus import MilvusException

        return (MilvusException,)

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

    def passages(self, rows: Sequence[int]) -> list[Passage]:
        found = self._client.get(self.name, ids=list(rows), output_fields=["*"])
        payloads = {each.pop("row"): {name: each[name] for name in each if name != "vector"} for each in found}
        return [passage_of(payloads[row]) for row in rows if row in payloads]

    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        if (taken := {"row", "vector"} & {name for each in passages for name in each.fields}) != set():
            raise InputError(f"milvus: expected fields with names other than row and vector, found {taken.pop()!r}")
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

    def errors(self) -> tuple[type[Exception], ...]:
        import psycopg

        return (psycopg.Error,)

    def _open(self) -> None:
        import psycopg
        from pgvector.psycopg import register_vector

        self._connection = psycopg.connect(self.where, autocommit=True)
        self._connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
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

    def passages(self, rows: Sequence[int]) -> list[Passage]:
        query = "SELECT row, id, title, text, fields FROM {} WHERE row = ANY(%s)"
        found = {row: Passage(*rest) for row, *rest in self._run(query, [list(rows)]).fetchall()}
        return [found[row] for row in rows if row in found]

    def put(self, first: int, passages: Sequence[Passage], vectors: np.ndarray) -> None:
        from psycopg import sql
        from psycopg.types.json import Jsonb

        statement = "COPY {} (row, id, title, text, fields, embedding) FROM STDIN WITH (FORMAT BINARY)"
        with self._connection.transaction(), self._connection.cursor() as cursor:
            self._run("DELETE FROM {} WHERE row >= %s", [first])
            with cursor.copy(sql.SQL(statement).format(sql.Identifier(self.name))) as copy:
                copy.set_types(["int8", "text", "text", "text", "jsonb", "vector"])
                for row, (passage, vector) in enumerate(zip(passages, vectors, strict=True), start=first):
                    kept = self.stored(passage)
                    copy.write_row([row, kept.id, kept.title, kept.text, Jsonb(dict(kept.fields)), vector])

    def stored(self, passage: Passage) -> Passage:
        fields = {_without_nul(name): _without_nul(value) for name, value in passage.fields.items()}
        return Passage(passage.id, _without_nul(passage.title), _without_nul(passage.text), fields)

    def search(self, queries: np.ndarray, k: int) -> list[list[int]]:
        statement = "SELECT row FROM {} ORDER BY embedding <#> %s LIMIT %s"
        return [[int(row) for (row,) in self._run(statement, [query, k]).fetchall()] for query in queries]

    def close(self) -> None:
        self._connection.close()


def _without_nul(value: Any) -> Any:
    """A value without NUL, which PostgreSQL's texts cannot hold."""
    if isinstance(value, list):
        return [_without_nul(each) for each in value]
    return value.replace("\0", "\ufffd") if isinstance(value, str) else value
