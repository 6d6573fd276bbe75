"""Converts Perl's documentation format to plain text: sections of a .pod file and their links; see perlpod(1)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

ENTITIES = {"lt": "<", "gt": ">", "sol": "/", "verbar": "|"}
# Placeholders for brackets of the text, while formatting codes are removed.
HIDDEN = str.maketrans("<>|/", "\x01\x02\x03\x04")
SHOWN = str.maketrans("\x01\x02\x03\x04", "<>|/")


@dataclass
class Section:
    """A heading (or list items that share a text) with the text below it, up to the next heading."""

    level: int
    headings: list[str]
    paragraphs: list[str] = field(default_factory=list)
    links: set[tuple[str, str]] = field(default_factory=set)
    """(page, section) of every link to a section."""

    @property
    def text(self) -> str:
        """The paragraphs, separated by blank lines. Code keeps its lines."""
        return "\n\n".join(self.paragraphs)


def sections(pod: str, *, items: bool = False) -> Iterator[Section]:
    """Every section of a page, in order.

    Args:
        pod: The source.
        items: Whether the items of outermost lists are sections too, as in perlfunc. They have level 9.
    """
    current: Section | None = None
    depth, skipped = 0, False
    for block in re.split(r"\n(?:[ \t]*\n)+", pod.replace("\r\n", "\n")):
        block = block.strip("\n")
        command = re.match(r"=([a-z]+)(\d?)\s*(.*)", block, re.DOTALL)
        if command is None:
            if current is not None and block.strip() and not skipped:
                current.links |= set(links(block))
                current.paragraphs.append(block if block[0] in " \t" else plain(block))
            continue
        name, digit, rest = command[1], command[2], " ".join(command[3].split())
        if name in ("begin", "end"):
            # For an output format other than text.
            skipped = name == "begin"
        elif name in ("over", "back"):
            depth += 1 if name == "over" else -1
        elif name == "head" or (name == "item" and items and depth == 1):
            level, heading = (int(digit), plain(rest)) if name == "head" else (9, plain(rest))
            if current is not None and level == 9 == current.level and not current.paragraphs:
                current.headings.append(heading)
                continue
            if current is not None:
                yield current
            current = Section(level, [heading])
        elif name == "item" and current is not None and rest.strip("*"):
            current.links |= set(links(rest))
            current.paragraphs.append(plain(rest))
    if current is not None:
        yield current


def plain(text: str) -> str:
    """A paragraph on one line, without formatting codes."""
    text = _unwrap_wide(" ".join(text.split()))
    while True:
        bare = re.sub(r"([A-Z])<([^<>]*)>", lambda code: _shown(code[1], code[2]), text)
        if bare == text:
            return " ".join(text.translate(SHOWN).split())
        text = bare


def links(text: str) -> Iterator[tuple[str, str]]:
    """(page, section) of the links L<page/"section">. Links within a page have the page ""."""
    for target in re.findall(r"L<([^<>]*(?:[A-Z]<[^<>]*>[^<>]*)*)>", _unwrap_wide(" ".join(text.split()))):
        page, slash, section = target.rpartition("|")[2].partition("/")
        if slash and "://" not in target:
            yield page.strip(), plain(section.strip().strip('"'))


def _unwrap_wide(text: str) -> str:
    """Convert C<< a > b >> to C<a > b>, with its inner brackets hidden."""
    return re.sub(
        r"([A-Z])(<{2,})\s(.*?)\s>{2,}",
        lambda code: f"{code[1]}<{code[3].translate(HIDDEN) if code[1] == 'C' else code[3]}>",
        text,
    )


def _shown(code: str, inside: str) -> str:
    if code in "XZ":
        return ""
    if code == "E":
        named = ENTITIES.get(inside) or (chr(int(inside)) if inside.isdigit() else inside)
        return named.translate(HIDDEN)
    if code == "L":
        label, bar, _ = inside.partition("|")
        if bar:
            return label
        page, slash, section = inside.partition("/")
        if slash and "://" not in inside:
            section = section.strip('"')
            return f'"{section}" in {page}' if page else f'"{section}"'
    return inside
