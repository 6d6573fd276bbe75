"""Helpers of the builders of held-out test sets: sources with known checksums, reproducible BEIR folders."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from index.beir import beir_file
from index.files import InputError, atomic_folder, sha256_file

TABLES = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")


def checked_source(folder: Path, name: str, sha256: str, package: str) -> Path:
    """Path of the file `name` of an unpacked or installed Debian package.

    Raises:
        InputError: it is missing or has another checksum.
    """
    path = folder / name
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the files of Debian's package {package}")
    found = sha256_file(path)
    if found != sha256:
        raise InputError(f"{path}: expected that of {package} (sha256 {sha256[:12]}…), found another ({found[:12]}…)")
    return path


def tables_of(
    passages: Mapping[str, str], queries: Mapping[str, str], qrels: Mapping[str, Mapping[str, int]]
) -> dict[str, str]:
    """The three files of a BEIR folder as text, with rows in the given order."""
    return {
        "corpus.jsonl": _lines({"_id": key, "title": "", "text": text} for key, text in passages.items()),
        "queries.jsonl": _lines({"_id": key, "text": text} for key, text in queries.items()),
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\n"
        + "".join(f"{query}\t{passage}\t{grade}\n" for query in qrels for passage, grade in qrels[query].items()),
    }


def _lines(rows: Iterable[Mapping[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def checksums(tables: Mapping[str, str], sources: Mapping[str, str]) -> dict[str, str]:
    """For the README: sha256 and name of the tables and of their sources, one per line."""
    return {
        "sums": "\n".join(f"{hashlib.sha256(text.encode()).hexdigest()}  {name}" for name, text in tables.items()),
        "sources": "\n".join(f"{sha256}  {name}" for name, sha256 in sources.items()),
    }


def write_bundled(out: Path, tables: Mapping[str, str], license: str, readme: str) -> None:
    """Write compressed tables, LICENSE and README.md. Equal content gives equal bytes.

    Raises:
        InputError: `out` contains other files.
    """
    _refuse_foreign(out)
    with atomic_folder(out) as folder:
        (folder / "qrels").mkdir()
        for name, text in tables.items():
            buffer = io.BytesIO()
            # Without time and file name.
            with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as stream:
                stream.write(text.encode())
            (folder / f"{name}.gz").write_bytes(buffer.getvalue())
        (folder / "LICENSE").write_text(license, encoding="utf-8")
        (folder / "README.md").write_text(readme, encoding="utf-8")


def unpack(bundled: Path, out: Path) -> None:
    """Copy a bundled folder uncompressed, for programs that cannot read .gz files.

    Raises:
        InputError: a file is missing, or `out` contains other files.
    """
    _refuse_foreign(out)
    with atomic_folder(out) as folder:
        (folder / "qrels").mkdir()
        for name in TABLES:
            (folder / name).write_bytes(gzip.decompress(beir_file(bundled, name).read_bytes()))
        for name in ("LICENSE", "README.md"):
            shutil.copyfile(bundled / name, folder / name)


def _refuse_foreign(out: Path) -> None:
    # The folder is replaced as a whole, so it must not contain anything else.
    ours = {"LICENSE", "README.md", "qrels", *TABLES, *(f"{name}.gz" for name in TABLES)}
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - ours):
        raise InputError(f"{out}: expected a new folder or one that this script wrote, found other files")


def finish(name: str, work: Callable[[], object], out: Path) -> int:
    """Run a builder. Returns the exit code; prints the folder, or one line that describes the error."""
    try:
        work()
    except (InputError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0
