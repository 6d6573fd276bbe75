"""Search settings that meet a recall target, measured against exact search."""
