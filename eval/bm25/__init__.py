"""BM25 search, and a cache of its runs on disk."""
