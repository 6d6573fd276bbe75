"""Excerpts of passages with the query's words marked."""

from __future__ import annotations

import re

# Characters of an excerpt, about four lines.
LENGTH = 320
_WORD = re.compile(r"\w+")


def marked_excerpt(text: str, query: str, length: int = LENGTH) -> list[tuple[str, bool]]:
    """The part of a text with most of the query's words, in pieces.

    Args:
        text: the text.
        query: the query; words of one letter are left out.
        length: maximum characters, without the "…" where text is left out.

    Returns:
        (piece, whether it is a word of the query), in order. The caller escapes them.
    """
    wanted = {word for word in _WORD.findall(query.casefold()) if len(word) > 1}
    hits = [match for match in _WORD.finditer(text) if match[0].casefold() in wanted]
    start = _best_start(text, hits, length) if len(text) > length else 0
    stop = min(len(text), start + length)
    if stop < len(text):
        # End before a word, unless the words are longer than an excerpt.
        stop = max(text.rfind(" ", start, stop), start + length // 2)
    pieces: list[tuple[str, bool]] = [("…", False)] if start else []
    position = start
    for hit in hits:
        if start <= hit.start() and hit.end() <= stop:
            pieces += [(text[position : hit.start()], False), (hit[0], True)]
            position = hit.end()
    pieces.append((text[position:stop], False))
    if stop < len(text):
        pieces.append(("…", False))
    return [(piece, marked) for piece, marked in pieces if piece]


def _best_start(text: str, hits: list[re.Match[str]], length: int) -> int:
    """Where the window with most different words of the query begins; the earliest of equal ones."""
    best, start = 0, 0
    for number, first in enumerate(hits):
        inside = {hit[0].casefold() for hit in hits[number:] if hit.end() <= first.start() + length - length // 4}
        if len(inside) > best:
            best, start = len(inside), max(0, first.start() - length // 4)
    if start == 0 or start + length >= len(text):
        start = min(start, max(0, len(text) - length))
    return text.find(" ", start) + 1 if start and 0 <= text.find(" ", start) < start + length // 8 else start
