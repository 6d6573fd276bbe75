"""Finding search settings that reach a recall target, measured against exact search."""
