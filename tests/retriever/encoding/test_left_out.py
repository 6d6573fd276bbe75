"""Rows that cannot be read are left out where the user asks for it, and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import MEANINGS, assert_refused, command, write_lines

from index.manifest import EMBEDDINGS, read_manifest
from index.store.reader import EmbeddingStore
from retriever.encoding.left_out import LEFT_OUT

GOOD = [json.dumps({"_id": word, "text": text}) for word, text in MEANINGS.items()]
# Row number -> a row that is no passage, and why.
BROKEN = {
    3: (b"{", "expected JSON"),
    7: (b'{"_id": "a b", "text": "x"}', "expected an id without white space"),
    8: (b'{"_id": "n"}', "expected a column 'text'"),
    12: (b'{"_id": "bytes", "text": "\xff"}', "expected UTF-8, found byte 0xff"),
    23: (b"[1]", "expected a JSON object"),
}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [line.encode() for line in GOOD]
    for row, (line, _) in BROKEN.items():
        lines.insert(row, line)
    (path := tmp_path / "corpus.jsonl").write_bytes(b"\n".join(lines))
    return path


def test_rows_that_cannot_be_read_are_left_out_on_request_and_named(world: Any, corpus: Path, tmp_path: Path) -> None:
    words = ("encode", "--model", world.model, "--data", corpus, "--out", tmp_path / "store", "--shard-rows", 5)
    assert_refused(command(*words), 1, rf"{corpus}:4: expected JSON")
    # The store that was begun is continued: its rows are the first of the corpus.
    outcome = command(*words, "--skip-broken")
    assert outcome.code == 0, outcome.err
    assert f"5 rows left out, named in {tmp_path / 'store' / LEFT_OUT}; the first: {corpus}:4" in outcome.err
    named = [json.loads(line) for line in (tmp_path / "store" / LEFT_OUT).read_text().splitlines()]
    assert [each["row"] for each in named] == list(BROKEN)
    for each, (_, reason) in zip(named, BROKEN.values(), strict=True):
        assert each["reason"].startswith(f"{corpus}:{each['row'] + 1}: {reason}")
    store = EmbeddingStore.open(tmp_path / "store")
    assert list(store.ids()) == list(MEANINGS)
    assert read_manifest(store.folder, EMBEDDINGS).fields["source"]["left_out"] == "5 rows"
    clean = write_lines(tmp_path / "clean.jsonl", list(GOOD))
    assert command(*words[:4], clean, "--out", tmp_path / "clean", *words[7:], "--skip-broken").code == 0
    assert (EmbeddingStore.open(tmp_path / "clean").vectors() == store.vectors()).all()
    assert not (tmp_path / "clean" / LEFT_OUT).exists()


def test_a_table_with_a_row_of_other_columns(world: Any, tmp_path: Path) -> None:
    (corpus := tmp_path / "corpus.tsv").write_text("id\ttext\na\tone\nb\nc\tthree\n")
    words = ("encode", "--model", world.model, "--data", corpus, "--out", tmp_path / "store")
    assert_refused(command(*words), 1, rf"{corpus}:3: expected 2 columns, found 1")
    assert command(*words, "--skip-broken").code == 0
    assert list(EmbeddingStore.open(tmp_path / "store").ids()) == ["a", "c"]
