"""Builds the bundled reverse dictionary from WordNet 3.0, and its subsets by part of speech, as BEIR folders."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from index.beir import beir_file, read_qrels
from index.files import InputError, atomic_folder, sha256_file
from index.records import read_records
from scripts import DATA

BUNDLED = DATA / "wordnet"
SPLITS = ("train", "dev", "test")
POS_LETTERS = {"noun": "n", "verb": "v", "adjective": "a", "adverb": "r"}
SOURCES = {
    "data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
    "data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
    "data.adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
    "data.adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
}
TABLES = ("corpus.jsonl", "queries.jsonl", *(f"qrels/{split}.tsv" for split in SPLITS))


@dataclass(frozen=True)
class Synset:
    """A line of a WordNet data file: "v-00001740", its headwords with underscores, its definition."""

    id: str
    pos: str
    members: list[str]
    definition: str


@dataclass
class Query:
    """A definition, with every headword that it defines."""

    id: str
    text: str
    pos: set[str] = field(default_factory=set)
    members: set[str] = field(default_factory=set)


def parse_synset(line: str) -> Synset:
    """Parse a line of data.{noun,verb,adj,adv}, in the format of WordNet's manual page wndb(5WN).

    Adjective satellites ("s") become adjectives ("a"). Syntactic markers, as in "galore(ip)", are dropped.
    """
    head, gloss = line.split(" | ", 1)
    columns = head.split(" ")
    pos = columns[2].replace("s", "a")
    count = int(columns[3], 16)
    words = [re.sub(r"\((a|p|ip)\)$", "", word) for word in columns[4 : 4 + 2 * count : 2]]
    return Synset(f"{pos}-{columns[0]}", pos, words, definition_of(gloss))


def definition_of(gloss: str) -> str:
    """The gloss up to its first example: a quotation after a semicolon, colon or comma (but not in "e.g., …")."""
    definition = re.split(r'(?<!e\.g\.)[;:,]\s*"', gloss, maxsplit=1)[0]
    return " ".join(definition.split()).rstrip(" ;:,")


def normalized(definition: str) -> str:
    """Normal form in which equal definitions are equal: letters and digits in lower case, single spaces."""
    return " ".join(re.findall(r"\w+", definition.casefold()))


def split_of(definition: str) -> str:
    """Assign eight tenths to train, one tenth to dev and one tenth to test, by a hash of the normalized definition.

    Synsets with equal definitions fall into one split, so that no text is in both train and test.
    """
    bucket = int.from_bytes(hashlib.sha256(normalized(definition).encode()).digest()[:8], "big") % 10
    return {0: "test", 1: "dev"}.get(bucket, "train")


def read_synsets(folder: Path) -> Iterator[Synset]:
    """Every synset of a WordNet 3.0 folder.

    Raises:
        InputError: a data file is missing or from another version.
    """
    for name, sha256 in SOURCES.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected WordNet 3.0 (Debian package wordnet-base)")
        found = sha256_file(path)
        if found != sha256:
            raise InputError(
                f"{path}: expected WordNet 3.0 (sha256 {sha256[:12]}…), found another version ({found[:12]}…)"
            )
        for line in path.read_text(encoding="ascii").splitlines():
            # The license at the top is indented.
            if not line.startswith("  "):
                yield parse_synset(line)


def build_tables(synsets: Iterable[Synset]) -> dict[str, str]:
    """The BEIR files as text, by name. Rows are sorted, so that the bytes depend only on the synsets."""
    queries: dict[str, Query] = {}
    headwords: dict[str, set[str]] = {}
    for synset in synsets:
        query = queries.setdefault(normalized(synset.definition), Query(synset.id, synset.definition))
        query.pos.add(synset.pos)
        query.members.update(synset.members)
        for word in synset.members:
            headwords.setdefault(word, set()).add(synset.pos)

    ordered = sorted(queries.values(), key=lambda query: query.id)
    tables = {
        "corpus.jsonl": _json_lines(
            {"_id": word, "title": "", "text": word.replace("_", " "), "metadata": {"pos": _letters(headwords[word])}}
            for word in sorted(headwords)
        ),
        "queries.jsonl": _json_lines(
            {"_id": query.id, "text": query.text, "metadata": {"pos": _letters(query.pos)}} for query in ordered
        ),
    }
    for split in SPLITS:
        pairs = [(q.id, word) for q in ordered if split_of(q.text) == split for word in sorted(q.members)]
        tables[f"qrels/{split}.tsv"] = _qrels_text(pairs)
    return tables


def _letters(pos: set[str]) -> str:
    return "".join(letter for letter in POS_LETTERS.values() if letter in pos)


def _json_lines(rows: Iterable[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _qrels_text(pairs: Iterable[tuple[str, str]]) -> str:
    return "query-id\tcorpus-id\tscore\n" + "".join(f"{query}\t{passage}\t1\n" for query, passage in pairs)


def gzipped(text: str) -> bytes:
    """Compress without time and name, so that equal texts give equal bytes."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as stream:
        stream.write(text.encode())
    return buffer.getvalue()


def license_of(wordnet: Path) -> str:
    """WordNet's license, from the numbered lines at the top of a data file."""
    with open(wordnet / "data.verb", encoding="ascii") as stream:
        lines = [line for line in stream if line.startswith("  ")]
    return "".join(re.sub(r"^ +[0-9]+ ?", "", line).rstrip() + "\n" for line in lines)


def readme_of(tables: dict[str, str]) -> str:
    """The README of the bundled folder, with counts and checksums."""
    queries = [json.loads(line) for line in tables["queries.jsonl"].splitlines()]
    corpus = [json.loads(line) for line in tables["corpus.jsonl"].splitlines()]
    judged = {split: [row.split("\t")[0] for row in tables[f"qrels/{split}.tsv"].splitlines()[1:]] for split in SPLITS}
    pos_of = {row["_id"]: row["metadata"]["pos"] for row in queries}
    rows = []
    for name, letters in (("all", "nvar"), *POS_LETTERS.items()):
        words = sum(any(letter in row["metadata"]["pos"] for letter in letters) for row in corpus)
        counts = [sum(any(letter in pos_of[q] for letter in letters) for q in set(judged[s])) for s in SPLITS]
        rows.append(f"| {name} | {words:,} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    pairs = ", ".join(f"{split} {len(judged[split]):,}" for split in SPLITS)
    sums = "\n".join(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}" for name, text in tables.items())
    sources = "\n".join(f"{sha256}  {name}" for name, sha256 in SOURCES.items())
    return README.format(rows="\n".join(rows), pairs=pairs, sums=sums, sources=sources)


README = """# WordNet 3.0 as a reverse dictionary

Queries are definitions, passages are headwords. All headwords of the defined synset are relevant (grade 1). BEIR
layout.

| part of speech | headwords | train queries | dev queries | test queries |
|---|---:|---:|---:|---:|
{rows}

Query-passage pairs: {pairs}. A definition or headword of several parts of speech counts in each.

## Sources
WordNet 3.0, the files data.noun, data.verb, data.adj and data.adv of Debian's package `wordnet-base` (3.0); WordNet 3.1
is different. Copyright 2006 Princeton University, under the WordNet license: the text is in LICENSE and must
accompany every copy. The files here are modified: a selection in another format.

## Build
    python scripts/datasets/make_wordnet.py build --wordnet /usr/share/wordnet --out scripts/datasets/data/wordnet

- A definition is the gloss before its first example sentence. In headwords, underscores become spaces and adjective
  markers such as (p) are dropped. Case is kept ("March" and "march" are two passages). Strings are unique.
- Ids: a query has its synset's part of speech and offset ("v-00001740"; satellites are adjectives, "a"), a passage
  its headword with underscores. `metadata.pos` holds n, v, a, r for noun, verb, adjective, adverb.
- Synsets with equal definitions (letters and digits in lower case) are one query with the id of the first synset, and
  all of their headwords are relevant. No definition is in two splits.
- Splits by query: the first eight bytes of the sha256 of that normalized definition, as a big-endian number, modulo
  10; 0 is test, 1 is dev, the rest train. The corpus is the same for every split: every headword.
- Rows are sorted, and gzip stores neither time nor name, so the same WordNet gives the same bytes (also compressed, if
  Python is built with the original zlib).

A subset by part of speech (its definitions, and the headwords that have that part of speech), or the whole (`--pos
all`), uncompressed:

    python scripts/datasets/make_wordnet.py subset --pos verb --out runs/wordnet-verbs

## Checksums
sha256 of the uncompressed files here (as `subset --pos all` writes them):

```
{sums}
```

and of the four source files:

```
{sources}
```
"""


def build(wordnet: Path, out: Path) -> None:
    """Write the bundled folder: compressed tables, LICENSE, README.md.

    Raises:
        InputError: `wordnet` is not WordNet 3.0, or `out` contains other files.
    """
    _refuse_foreign(out)
    tables = build_tables(read_synsets(wordnet))
    with atomic_folder(out) as folder:
        (folder / "qrels").mkdir()
        for name, text in tables.items():
            (folder / f"{name}.gz").write_bytes(gzipped(text))
        (folder / "LICENSE").write_text(license_of(wordnet), encoding="utf-8")
        (folder / "README.md").write_text(readme_of(tables), encoding="utf-8")


def subset(source: Path, pos: str, out: Path) -> None:
    """Write the uncompressed BEIR folder of one part of speech (or "all") of the bundled set, with the license.

    Raises:
        InputError: a file of `source` is missing or damaged, or `out` contains other files.
    """
    _refuse_foreign(out)
    letters = set(POS_LETTERS.values()) if pos == "all" else {POS_LETTERS[pos]}
    kept: dict[str, list[dict[str, object]]] = {}
    for name in ("corpus.jsonl", "queries.jsonl"):
        records = read_records(beir_file(source, name))
        kept[name] = [record.fields for record in records if letters & set(record.fields["metadata"]["pos"])]
    passages, queries = ({row["_id"] for row in kept[name]} for name in ("corpus.jsonl", "queries.jsonl"))
    with atomic_folder(out) as folder:
        (folder / "qrels").mkdir()
        for name, rows in kept.items():
            (folder / name).write_text(_json_lines(rows), encoding="utf-8")
        for split in SPLITS:
            qrels = read_qrels(beir_file(source, f"qrels/{split}.tsv"))
            pairs = [(q, p) for q, grades in qrels.items() if q in queries for p in grades if p in passages]
            (folder / "qrels" / f"{split}.tsv").write_text(_qrels_text(pairs), encoding="utf-8")
        shutil.copyfile(source / "LICENSE", folder / "LICENSE")


def _refuse_foreign(out: Path) -> None:
    # The folder is replaced as a whole, so it must not contain anything else.
    ours = {"LICENSE", "README.md", "qrels", *TABLES, *(f"{name}.gz" for name in TABLES)}
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - ours):
        raise InputError(f"{out}: expected a new folder or one that this script wrote, found other files")


def main(arguments: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("build", help="make the bundled folder from WordNet's own files")
    whole.add_argument(
        "--wordnet",
        type=Path,
        default=Path("/usr/share/wordnet"),
        help="folder with data.noun, data.verb, data.adj, data.adv of WordNet 3.0 (default: %(default)s, where "
        "Debian's package wordnet-base puts them)",
    )
    whole.add_argument("--out", type=Path, default=BUNDLED, help="folder to write (default: %(default)s)")
    part = commands.add_parser("subset", help="unpack the bundled folder, or one part of speech of it")
    part.add_argument("--pos", choices=(*POS_LETTERS, "all"), required=True, help="part of speech to keep")
    part.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(arguments)
    try:
        if given.command == "build":
            build(given.wordnet, given.out)
        else:
            subset(BUNDLED, given.pos, given.out)
    except (InputError, OSError) as error:
        print(f"make_wordnet: {error}", file=sys.stderr)
        return 1
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
