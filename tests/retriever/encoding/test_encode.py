"""Embeddings are in the order of their texts, and an interrupted store ends with the bytes of an uninterrupted one."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import command, write_lines

from index.files import InputError
from index.passages import Passage, PassageFile, read_passages
from index.store.reader import EmbeddingStore
from retriever.config.model import ModelConfig
from retriever.encoding.corpus import StoreOptions, corpus_source, encode_passages
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.models.modality import build_towers, load_towers
from retriever.models.towers import Towers

ROOT = Path(__file__).resolve().parents[3]
WORDS = ("cat", "dog", "oak", "pine", "river", "piano", "bread", "cheese", "hammer", "eagle", "ship", "winter")


@pytest.fixture(scope="module")
def towers(tiny: ModelConfig) -> Towers:
    torch.manual_seed(0)
    return build_towers(tiny).eval()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, size=random.integers(1, 40))) for _ in range(97)] + ["", " "]


@pytest.fixture(scope="module")
def single(towers: Towers, texts: list[str]) -> np.ndarray:
    """The embedding of each text in a batch of its own, without padding."""
    return np.concatenate([embed_texts(towers, [text], "document", EncodeOptions()) for text in texts])


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    return write_lines(tmp_path / "corpus.jsonl", [{"_id": f"d{i}", "text": t} for i, t in enumerate(texts)])


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("tokens", [1, 50, 333, 100_000])
def test_the_micro_batch_changes_neither_order_nor_values(
    towers: Towers, texts: list[str], single: np.ndarray, tokens: int
) -> None:
    done: list[int] = []
    together = embed_texts(towers, texts, "document", EncodeOptions(micro_batch_tokens=tokens), done.append)
    assert together.shape == (99, 32) and together.dtype == np.float32 and sum(done) == 99
    np.testing.assert_allclose(together, single, atol=1e-5)
    # Different texts have different vectors, so the comparison detects a wrong order.
    assert np.abs(together[:10, None] - together[None, :10]).max(axis=2)[~np.eye(10, dtype=bool)].min() > 1e-3


def test_no_texts_give_no_embeddings(towers: Towers) -> None:
    assert embed_texts(towers, [], "query", EncodeOptions()).shape == (0, 32)


def test_an_empty_corpus_is_refused_and_leaves_no_complete_store(towers: Towers, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", [])
    with pytest.raises(InputError, match=r"corpus\.jsonl: expected passages, found none"):
        encode_passages(towers, read_passages(corpus), tmp_path / "e", EncodeOptions(), source=corpus_source(corpus))
    with pytest.raises(InputError, match="incomplete"):
        EmbeddingStore.open(tmp_path / "e")


def test_the_prompt_of_a_side_is_inserted_before_its_texts(tiny: ModelConfig) -> None:
    torch.manual_seed(0)
    towers = build_towers(dataclasses.replace(tiny, query_prompt="cat: ")).eval()
    options = EncodeOptions()
    query = embed_texts(towers, ["a dog"], "query", options)
    np.testing.assert_array_equal(query, embed_texts(towers, ["cat: a dog"], "document", options))
    assert np.abs(query - embed_texts(towers, ["a dog"], "document", options)).max() > 1e-3


def test_half_precision_is_close_and_the_dtype_is_stored(towers: Towers, corpus: Path, tmp_path: Path) -> None:
    source = corpus_source(corpus)
    stores = [
        encode_passages(
            towers,
            read_passages(corpus),
            tmp_path / name,
            EncodeOptions(precision),
            source=source,
            storage=StoreOptions(dtype),
        )
        for name, precision, dtype in (("a", "fp32", "float32"), ("b", "fp32", "float16"), ("c", "bf16", "float32"))
    ]
    assert [store.vectors().dtype for store in stores] == [np.float32, np.float16, np.float32]
    np.testing.assert_allclose(stores[0].vectors(), stores[1].vectors(), atol=1e-3)
    np.testing.assert_allclose(stores[0].vectors(), stores[2].vectors(), atol=0.05)


@pytest.mark.parametrize("stop_at", [0, 15, 16, 50, 98])
def test_an_interrupted_store_ends_with_the_bytes_of_an_uninterrupted_one(
    towers: Towers, corpus: Path, tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The corpus has several windows, whose size does not divide that of a shard.
    monkeypatch.setattr("retriever.encoding.windows.FIRST_WINDOW", 4)
    source, options = corpus_source(corpus), EncodeOptions(micro_batch_tokens=200)

    def encode(out: Path, passages: Iterable[Passage] | None = None) -> EmbeddingStore:
        rows = read_passages(corpus) if passages is None else passages
        storage = StoreOptions(shard_rows=16, window=10)
        return encode_passages(towers, rows, out, options, source=source, storage=storage)

    def interrupted() -> Iterator[Passage]:
        for number, passage in enumerate(read_passages(corpus)):
            if number == stop_at:
                raise KeyboardInterrupt
            yield passage

    complete = encode(tmp_path / "complete")
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "interrupted", interrupted())
    with pytest.raises(InputError, match="incomplete"):
        EmbeddingStore.open(tmp_path / "interrupted")
    store = encode(tmp_path / "interrupted")
    assert stored(tmp_path / "interrupted") == stored(tmp_path / "complete")
    assert list(store.ids()) == [f"d{i}" for i in range(99)] and store.rows == complete.rows == 99
    embedded = embed_texts(towers, [passage.content for passage in store.passages()], "document", options)
    np.testing.assert_allclose(store.vectors(), embedded, atol=1e-5)


def test_a_complete_store_is_left_unchanged(towers: Towers, corpus: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "e", corpus_source(corpus)
    encode_passages(towers, read_passages(corpus), out, EncodeOptions(), source=source)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    unread: list[Passage] = []  # the corpus is not read again
    assert encode_passages(towers, unread, out, EncodeOptions(), source=source).rows == 99
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_correcting_a_row_after_the_stored_ones_continues_the_store(
    towers: Towers, corpus: Path, tmp_path: Path
) -> None:
    good, out = corpus.read_text(), tmp_path / "e"

    def encode(folder: Path) -> EmbeddingStore:
        source, options, storage = corpus_source(corpus), EncodeOptions(), StoreOptions(shard_rows=40, window=16)
        return encode_passages(towers, PassageFile(corpus), folder, options, source=source, storage=storage)

    corpus.write_text(good + '{"_id": "x"\n')
    with pytest.raises(InputError, match=r":100: expected JSON"):
        encode(out)
    written = (out / "00001.npy").stat().st_mtime_ns
    # A stored row has changed.
    corpus.write_text(good.replace('"d7"', '"e7"', 1))
    with pytest.raises(InputError, match="begun with another source"):
        encode(out)
    corpus.write_text(good + '{"_id": "x", "text": "corrected"}\n')
    assert encode(out).rows == 100 and (out / "00001.npy").stat().st_mtime_ns == written
    assert encode(out).source["sha256"] == corpus_source(corpus)["sha256"]
    encode(tmp_path / "new")
    assert stored(out) == stored(tmp_path / "new")


def test_another_model_or_corpus_is_refused(towers: Towers, corpus: Path, tmp_path: Path, tiny: ModelConfig) -> None:
    out, source = tmp_path / "e", corpus_source(corpus)
    encode_passages(towers, read_passages(corpus), out, EncodeOptions(), source=source)
    before = stored(out)
    torch.manual_seed(1)
    other = build_towers(tiny).eval()
    with pytest.raises(InputError, match="begun with another model"):
        encode_passages(other, read_passages(corpus), out, EncodeOptions(), source=source)
    with corpus.open("a") as stream:
        stream.write('{"_id": "new", "text": "new"}\n')
    with pytest.raises(InputError, match="begun with another source"):
        encode_passages(towers, read_passages(corpus), out, EncodeOptions(), source=corpus_source(corpus))
    with pytest.raises(InputError, match="begun with another dtype"):
        encode_passages(
            towers, read_passages(corpus), out, EncodeOptions(), source=source, storage=StoreOptions("float16")
        )
    assert stored(out) == before


def test_encoding_does_not_change_the_fingerprint(minilm: str) -> None:
    towers = load_towers(minilm)
    before = towers.fingerprint()
    embed_texts(towers, ["a cat"], "query", EncodeOptions())
    assert towers.fingerprint() == before


def test_a_killed_process_leaves_a_store_that_can_be_continued(towers: Towers, tmp_path: Path) -> None:
    """After SIGKILL of the real command the store has complete shards only, and it ends with the same bytes."""
    model = tmp_path / "model"
    model.mkdir()
    towers.save(model)
    random = np.random.default_rng(1)
    corpus = write_lines(
        tmp_path / "corpus.jsonl",
        [{"_id": f"d{i}", "text": " ".join(random.choice(WORDS, size=30))} for i in range(6000)],
    )
    arguments = ["encode", "--model", str(model), "--data", str(corpus), "--shard-rows", "100"]
    arguments += ["--micro-batch-tokens", "2000", "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "retriever", *arguments, "--out", str(tmp_path / "killed")],
        env=env,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "killed" / "00001.npy").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    with pytest.raises(InputError, match=r"incomplete, [1-9]\d*00 rows so far"):
        EmbeddingStore.open(tmp_path / "killed")
    for name in ("killed", "complete"):
        outcome = command(*arguments, "--out", tmp_path / name)
        assert outcome.code == 0, outcome.err
    assert stored(tmp_path / "killed") == stored(tmp_path / "complete")


def test_a_loaded_model_gives_the_vectors_of_the_saved_one(towers: Towers, texts: list[str], tmp_path: Path) -> None:
    towers.save(tmp_path)
    loaded = load_towers(str(tmp_path))
    assert loaded.fingerprint() == towers.fingerprint()
    np.testing.assert_array_equal(
        embed_texts(loaded, texts, "query", EncodeOptions()), embed_texts(towers, texts, "query", EncodeOptions())
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_write_the_bytes_that_threads_write(
    towers: Towers, corpus: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever.encoding.windows.FIRST_WINDOW", 4)
    monkeypatch.setattr("retriever.encoding.window_workers.PIECE", 3)
    options = EncodeOptions(micro_batch_tokens=200)

    def encode(folder: str, workers: int, passages: Iterable[Passage], progress: Any = None) -> EmbeddingStore:
        source, storage = corpus_source(corpus), StoreOptions(shard_rows=16, window=10, workers=workers)
        out = tmp_path / folder
        return encode_passages(towers, passages, out, options, source=source, storage=storage, progress=progress)

    encode("threads", 0, read_passages(corpus))
    out = tmp_path / "workers"
    invalid = list(read_passages(corpus))
    invalid[50] = dataclasses.replace(invalid[50], id="two words")
    with pytest.raises(InputError, match=f"^{out}: row 50: expected an id without white space, found 'two words'$"):
        encode("workers", workers, invalid)
    # The shards before it are complete, except for the last window, which was still being encoded.
    assert len(list(out.glob("*.npy"))) == 2
    progress: list[int] = []
    encode("workers", workers, read_passages(corpus), progress.append)
    assert progress[0] == 32 and sum(progress) == 99
    assert stored(out) == stored(tmp_path / "threads")


@pytest.mark.parametrize("workers", [0, 3])
def test_invalid_lines_are_named_and_empty_passages_reported(
    towers: Towers, corpus: Path, tmp_path: Path, workers: int
) -> None:
    lines = corpus.read_text(encoding="utf-8").splitlines()
    lines[20] = json.dumps({"_id": "empty", "text": ""})
    notices: list[tuple[str, str]] = []
    options: dict[str, Any] = {
        "source": {"name": "c"},
        "storage": StoreOptions(window=8, workers=workers),
        "notice": lambda *notice: notices.append(notice),
    }
    (path := tmp_path / "empty.jsonl").write_text("\n".join(lines), encoding="utf-8")
    encode_passages(towers, read_passages(path), tmp_path / "empty", EncodeOptions(), **options)
    assert notices[0] == ("passages without any text", "empty")
    lines[70] = "{"
    (path := tmp_path / "bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{path}:71: expected JSON, found: [^\n]*$"):
        encode_passages(towers, read_passages(path), tmp_path / "bad", EncodeOptions(), **options)


def test_a_store_can_be_continued_after_a_duplicate_id(towers: Towers, corpus: Path, tmp_path: Path) -> None:
    passages, source = list(read_passages(corpus)), corpus_source(corpus)
    options: dict[str, Any] = {"source": source, "storage": StoreOptions(shard_rows=10, window=5)}
    twice = [*passages[:22], dataclasses.replace(passages[22], id=passages[3].id), *passages[23:]]
    with pytest.raises(InputError, match="rows 3 and 22"):
        encode_passages(towers, twice, tmp_path / "store", EncodeOptions(), **options)
    store = encode_passages(towers, passages, tmp_path / "store", EncodeOptions(), **options)
    assert list(store.ids()) == [passage.id for passage in passages]


def test_a_corpus_is_encoded_with_the_prompt(tiny: ModelConfig, corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    towers = build_towers(dataclasses.replace(tiny, passage_prompt="cat: ")).eval()
    source, options = corpus_source(corpus), EncodeOptions()
    storage = StoreOptions(window=10)
    store = encode_passages(towers, read_passages(corpus), tmp_path / "store", options, source=source, storage=storage)
    stored = store.vectors()
    texts = ["cat: " + passage.content for passage in read_passages(corpus)]
    expected = towers.model.encode(texts, prompt="", normalize_embeddings=False)
    np.testing.assert_allclose(stored, expected, atol=1e-5)
