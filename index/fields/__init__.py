"""Fields of passages (year, language, tags …): columns of an index, and filters of a search."""
