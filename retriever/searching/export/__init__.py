"""Writing embedding stores to other engines: Parquet, Qdrant, LanceDB, Milvus, PostgreSQL with pgvector, usearch."""
