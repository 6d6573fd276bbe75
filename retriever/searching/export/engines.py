"""The engines by name."""

from __future__ import annotations

from retriever.searching.export.databases import Lancedb, Milvus, Pgvector, Qdrant
from retriever.searching.export.engine import Engine
from retriever.searching.export.files import Parquet, Usearch

ENGINES: dict[str, type[Engine]] = {
    "parquet": Parquet,
    "qdrant": Qdrant,
    "lancedb": Lancedb,
    "milvus": Milvus,
    "pgvector": Pgvector,
    "usearch": Usearch,
}
