"""BM25: the search, and its runs kept on disk."""
