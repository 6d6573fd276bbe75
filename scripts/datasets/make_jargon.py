"""Builds the bundled description-to-article set from the Jargon File, as a BEIR folder."""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from scripts import DATA
from scripts.datasets.held_out import checked_source, checksums, finish, tables_of, unpack, write_bundled

BUNDLED = DATA / "jargon"
PACKAGE = "dict-jargon (4.4.7-3.1)"
SOURCES = {"jargon.dict.dz": "856ced964d3a3cfd79a3dc251df04365eefd848966e3ae94e58f2671d6e79ca5"}
# Minimum number of words.
LEAST_QUERY, LEAST_PASSAGE = 6, 25
MASK = "~"
ABBREVIATED = (
    *("esp", "e.g", "i.e", "etc", "vs", "cf", "Dr", "Mr", "Mrs", "ed", "approx", "St", "U.S", "Syn", "prob", "ca"),
    *("a.k.a", "pp", "vol", "No"),
)
# A full stop after an initial or an abbreviation does not end a sentence.
SENTENCE_END = re.compile(
    "".join(rf"(?<!\b{re.escape(word)}\.)" for word in ABBREVIATED)
    + r"(?<!\b[A-Z]\.)(?<=[.!?])([”’)\"']*) (?=[“‘(\[\"A-Z0-9])"
)

README = """# Jargon File
{queries:,} entries of the Jargon File, each split in two: the query is the first sentence of the definition, the
passage is the rest. The headword is masked in both. BEIR layout, only a test split. Passages are articles (median
{median} words, longest {longest:,}) on the language and folklore of programmers.

## Sources
Debian's package {package}, file /usr/share/dictd/jargon.dict.dz: the Jargon File, version 4.4.7,
29 Dec 2003 (http://catb.org/jargon/), edited by Eric S. Raymond. It is in the public domain; LICENSE quotes
its own statement. The files here are modified: entries are split in two, and headwords are masked.

## Relevance
The passage is relevant (grade 1) to the query from the same entry. The first sentence of an entry says what the thing
is; the rest says more about it (usage, origin, examples).

- The headword is replaced by "{mask}" in query and passage, in any case and with the usual endings. Pronunciations are
  dropped, and there is no title. Passages that still contain their headword: {leaked}.
- Query and passage share no sentence. Queries that occur literally in any passage: {verbatim}.
- Only the first of numbered senses is used, so that query and passage are about the same sense.
- All passages are built in the same way, so that only the content distinguishes relevant ones.

## Limitations
- Entries on related things ("memory leak", "aliasing bug") may fit a query as well. They are unjudged and count as not
  relevant. Scores are lower bounds: use them to compare systems.
- The queries are descriptions, not queries that users typed.
- Some passages are anecdotes that have little to do with the first sentence.
- Sentences are split by rules; {unclosed} queries end within a quotation or parenthesis.
- Other entries mention a masked headword in their cross-references ("See also …").
- The text is on the web, so a pretrained model may have seen it.

## Build
    apt-get download dict-jargon && dpkg-deb -x dict-jargon_*.deb dict-jargon     # or install the package
    python scripts/datasets/make_jargon.py build --dictd dict-jargon/usr/share/dictd --out scripts/datasets/data/jargon
    python scripts/datasets/make_jargon.py unpack --out runs/jargon  # uncompressed, for other programs

An entry is used if its first sentence has at least {least_query} words and the rest of its first sense at least
{least_passage}. Braces of cross-references and remarks in brackets before the first sentence ("[MIT]", "[common]") are
dropped. Ids are headwords with underscores, numbered if they repeat. Rows are sorted.

## Checksums
sha256 of the uncompressed files here:

```
{sums}
```

and of the source file:

```
{sources}
```
"""


@dataclass(frozen=True)
class Entry:
    """A headword, and the first sense of its definition, split after the first sentence."""

    headword: str
    first: str
    rest: str


def entries_of(text: str) -> Iterator[tuple[str, str]]:
    """(headword, body) of each entry of the dictd file: a line without indentation, then indented lines."""
    for block in re.split(r"\n\n(?=\S)", text):
        headword, _, body = block.partition("\n")
        # The text before the first entry describes the file and is not indented.
        if re.search(r"^ {4}\S", body, re.MULTILINE) and not headword.startswith("00-"):
            yield headword.strip(), body


def cut(headword: str, body: str) -> Entry | None:
    """Split an entry in two. Returns None if either part is too short."""
    # Pronunciation and part of speech are indented by one space, the definition by four.
    lines = [line for line in body.splitlines() if not re.match(r" \S", line)]
    text = " ".join(" ".join(lines).replace("\xad", "").split())
    text = re.sub(r"\{ ?([^{}]*?) ?\}", r"\1", text)
    senses = re.split(r"(?:(?<=^)|(?<=[.!?”)\]] ))[1-9]\. (?=\S)", text)
    # A remark on all senses may precede "1.".
    sense = senses[1] if len(senses) > 1 else senses[0]
    sense = re.sub(r"^(?:(?:n|v|vi|vt|adj|adv|interj|excl|prov|obs|pl|techspeak)\.,? ?)+", "", sense.strip())
    sense = re.sub(r"^(?:\[[^\]]*\] ?)+", "", sense)
    parts = SENTENCE_END.split(sense, maxsplit=1)
    if len(parts) < 3:
        return None
    first, rest = masked(parts[0] + parts[1], headword), masked(parts[2], headword)
    if len(words(first)) < LEAST_QUERY or len(words(rest)) < LEAST_PASSAGE:
        return None
    return Entry(headword, first, rest)


def masked(text: str, headword: str) -> str:
    """Replace the headword by "~", in any case and with plural and verb endings."""
    return headword_pattern(headword).sub(MASK, text)


def headword_pattern(headword: str) -> re.Pattern[str]:
    """Matches a headword and its usual forms: "zap" in "zapped", "code" in "coding", "black hole" in "black-holes"."""
    bare = re.sub(r"^[^\w]+|[^\w]+$", "", headword) or headword
    *before, last = re.split(r"[\s-]+", bare)
    if last[-1:].isalpha():
        if last[-1] in "eE":
            tail = rf"{re.escape(last[:-1])}(?:e(?:s|d|rs?|['’]s?)?|ings?)"
        else:
            double = f"(?:{re.escape(last[-1])}(?=ed|er|ing|y))?"
            tail = rf"{re.escape(last)}{double}(?:s|es|ed|ers?|ings?|y|['’]s?)?"
    else:
        tail = re.escape(last)
    phrase = r"[\s-]*".join([*map(re.escape, before), tail])
    return re.compile(rf"(?<!\w){phrase}(?!\w)", re.IGNORECASE)


def words(text: str) -> list[str]:
    """Words of letters and digits in lower case."""
    return re.findall(r"\w+", text.casefold())


def build_tables(entries: list[Entry]) -> dict[str, str]:
    """The BEIR files as text, by name. If first sentences are equal, the rest of each entry is relevant."""
    passages: dict[str, str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    asked: dict[str, str] = {}
    for entry in sorted(entries, key=lambda entry: (entry.headword, entry.first)):
        name = base = re.sub(r"\s+", "_", entry.headword)
        number = 1
        while name in passages:
            number += 1
            name = f"{base}-{number}"
        passages[name] = entry.rest
        query = asked.setdefault(" ".join(words(entry.first)), f"q-{name}")
        queries.setdefault(query, entry.first)
        qrels.setdefault(query, {})[name] = 1
    return tables_of(passages, queries, qrels)


def readme_of(tables: dict[str, str]) -> str:
    """The README of the bundled folder, with counts, remaining leaks and checksums."""
    passages = {row["_id"]: row["text"] for row in map(json.loads, tables["corpus.jsonl"].splitlines())}
    queries = [row["text"] for row in map(json.loads, tables["queries.jsonl"].splitlines())]
    lengths = [len(text.split()) for text in passages.values()]
    everything = "\n".join(" ".join(words(text)) for text in passages.values())
    leaked = sum(
        f" {' '.join(words(name))} " in f" {' '.join(words(text))} " for name, text in passages.items() if words(name)
    )
    return README.format(
        queries=len(queries),
        median=round(statistics.median(lengths)),
        longest=max(lengths),
        package=PACKAGE,
        mask=MASK,
        leaked=leaked,
        verbatim=sum(" ".join(words(query)) in everything for query in queries),
        unclosed=sum(query.count("“") != query.count("”") or query.count("(") != query.count(")") for query in queries),
        least_query=LEAST_QUERY,
        least_passage=LEAST_PASSAGE,
        **checksums(tables, SOURCES),
    )


def build(dictd: Path, out: Path) -> None:
    """Write the bundled folder.

    Raises:
        InputError: the dictionary is missing or has another version, or `out` contains other files.
    """
    (name,) = SOURCES
    path = checked_source(dictd, name, SOURCES[name], PACKAGE)
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        text = stream.read()
    license = text[text.index("This document (the Jargon File)") :].partition("\n\n")[0]
    found = [cut(headword, body) for headword, body in entries_of(text)]
    tables = build_tables([entry for entry in found if entry is not None])
    write_bundled(out, tables, license + "\n", readme_of(tables))


def main(arguments: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("build", help="make the bundled folder from the dictionary")
    whole.add_argument(
        "--dictd",
        type=Path,
        default=Path("/usr/share/dictd"),
        help="folder with jargon.dict.dz (default: %(default)s, where Debian's package dict-jargon puts it)",
    )
    whole.add_argument("--out", type=Path, default=BUNDLED, help="folder to write (default: %(default)s)")
    part = commands.add_parser("unpack", help="copy the bundled folder uncompressed")
    part.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(arguments)
    if given.command == "build":
        return finish("make_jargon", lambda: build(given.dictd, given.out), given.out)
    return finish("make_jargon", lambda: unpack(BUNDLED, given.out), given.out)


if __name__ == "__main__":
    sys.exit(main())
