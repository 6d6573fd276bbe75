"""Building an index, search, hybrid search, near-duplicates, and export to other engines."""
