"""Replaces the generated tables in a README."""

from __future__ import annotations

from collections.abc import Mapping


def fill_tables(readme: str, tables: Mapping[str, str]) -> str:
    """Replace the text between `<!-- NAME -->` and `<!-- /NAME -->` by each table.

    Args:
        readme: The text of the README.
        tables: Text by name. Each text ends with a line break.

    Raises:
        ValueError: the README lacks a marker.
    """
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found_start, rest = readme.partition(start)
        _, found_end, after = rest.partition(end)
        if not found_start or not found_end:
            raise ValueError(f"README: expected the markers {start.strip()} and {end}, found none")
        readme = f"{before}{start}{table}{end}{after}"
    return readme
