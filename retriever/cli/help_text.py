"""Field docstrings as help texts: the lines of a paragraph are joined.

tyro joins the lines of a docstring before it removes their indentation, and takes an indented line for a list item. It
has no setting for this, so its function is replaced while the command line is parsed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

from tyro import _strings


@contextlib.contextmanager
def joined_lines() -> Iterator[None]:
    """Context in which tyro joins the lines of field docstrings."""
    before = _strings.remove_single_line_breaks

    def remove_single_line_breaks(helptext: str) -> str:
        return before(inspect.cleandoc(helptext))

    _strings.remove_single_line_breaks = remove_single_line_breaks
    try:
        yield
    finally:
        _strings.remove_single_line_breaks = before
