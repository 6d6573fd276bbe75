"""Embeddings stand in the order of their texts, and an interrupted store ends with the bytes of an undisturbed one."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import command, write_lines

from index.files import InputError
from index.passages import Passage, PassageFile, read_passages
from index.store.reader import EmbeddingStore
from retriever.config.run import ModelConfig
from retriever.encoding.corpus import corpus_source, encode_passages
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.models.towers import Towers, build_towers, load_towers

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
def alone(towers: Towers, texts: list[str]) -> np.ndarray:
    """The embedding of each text by itself, without padding."""
    return np.concatenate([embed_texts(towers, [text], "document", EncodeOptions()) for text in texts])


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    return write_lines(tmp_path / "corpus.jsonl", [{"_id": f"d{i}", "text": t} for i, t in enumerate(texts)])


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("tokens", [1, 50, 333, 100_000])
def test_order_is_that_of_the_texts_whatever_the_micro_batch(
    towers: Towers, texts: list[str], alone: np.ndarray, tokens: int
) -> None:
    done: list[int] = []
    together = embed_texts(towers, texts, "document", EncodeOptions(micro_batch_tokens=tokens), done.append)
    assert together.shape == (99, 32) and together.dtype == np.float32 and sum(done) == 99
    np.testing.assert_allclose(together, alone, atol=1e-5)
    # Unlike texts have unlike vectors: the order could not be another one.
    assert np.abs(together[:10, None] - together[None, :10]).max(axis=2)[~np.eye(10, dtype=bool)].min() > 1e-3


def test_no_texts_make_no_embeddings(towers: Towers) -> None:
    assert embed_texts(towers, [], "query", EncodeOptions()).shape == (0, 32)


def test_empty_corpus_is_refused_and_leaves_no_complete_store(towers: Towers, tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "corpus.jsonl", [])
    with pytest.raises(InputError, match=r"corpus\.jsonl: expected passages, found none"):
        encode_passages(towers, read_passages(corpus), tmp_path / "e", EncodeOptions(), source=corpus_source(corpus))
    with pytest.raises(InputError, match="incomplete"):
        EmbeddingStore.open(tmp_path / "e")


def test_prompt_stands_before_every_text_of_its_side(tiny: ModelConfig) -> None:
    torch.manual_seed(0)
    towers = build_towers(dataclasses.replace(tiny, query_prompt="cat: ")).eval()
    options = EncodeOptions()
    query = embed_texts(towers, ["a dog"], "query", options)
    np.testing.assert_array_equal(query, embed_texts(towers, ["cat: a dog"], "document", options))
    assert np.abs(query - embed_texts(towers, ["a dog"], "document", options)).max() > 1e-3


def test_half_precision_is_near_and_stored_as_asked(towers: Towers, corpus: Path, tmp_path: Path) -> None:
    source = corpus_source(corpus)
    stores = [
        encode_passages(
            towers, read_passages(corpus), tmp_path / name, EncodeOptions(precision), source=source, dtype=dtype
        )
        for name, precision, dtype in (("a", "fp32", "float32"), ("b", "fp32", "float16"), ("c", "bf16", "float32"))
    ]
    assert [store.vectors().dtype for store in stores] == [np.float32, np.float16, np.float32]
    np.testing.assert_allclose(stores[0].vectors(), stores[1].vectors(), atol=1e-3)
    np.testing.assert_allclose(stores[0].vectors(), stores[2].vectors(), atol=0.05)


@pytest.mark.parametrize("stop_at", [0, 15, 16, 50, 98])
def test_interrupted_store_ends_with_the_bytes_of_an_undisturbed_one(
    towers: Towers, corpus: Path, tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Windows smaller than the corpus, and no multiple of the shards.
    monkeypatch.setattr("retriever.encoding.windows.FIRST_WINDOW", 4)
    source, options = corpus_source(corpus), EncodeOptions(micro_batch_tokens=200)

    def encode(out: Path, passages: object = None) -> EmbeddingStore:
        rows = read_passages(corpus) if passages is None else passages
        return encode_passages(towers, rows, out, options, source=source, shard_rows=16, window=10)  # type: ignore[arg-type]

    def cut_short() -> object:
        for number, passage in enumerate(read_passages(corpus)):
            if number == stop_at:
                raise KeyboardInterrupt
            yield passage

    whole = encode(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "cut", cut_short())
    with pytest.raises(InputError, match="incomplete"):
        EmbeddingStore.open(tmp_path / "cut")
    store = encode(tmp_path / "cut")
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")
    assert list(store.ids()) == [f"d{i}" for i in range(99)] and store.rows == whole.rows == 99
    embedded = embed_texts(towers, [passage.content for passage in store.passages()], "document", options)
    np.testing.assert_allclose(store.vectors(), embedded, atol=1e-5)


def test_complete_store_is_left_as_it_is(towers: Towers, corpus: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "e", corpus_source(corpus)
    encode_passages(towers, read_passages(corpus), out, EncodeOptions(), source=source)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again: list[Passage] = []  # not even read
    assert encode_passages(towers, again, out, EncodeOptions(), source=source).rows == 99
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_row_mended_behind_what_is_stored_leaves_it_stored(towers: Towers, corpus: Path, tmp_path: Path) -> None:
    good, out = corpus.read_text(), tmp_path / "e"

    def encode(place: Path) -> EmbeddingStore:
        source, options = corpus_source(corpus), EncodeOptions()
        return encode_passages(towers, PassageFile(corpus), place, options, source=source, shard_rows=40, window=16)

    corpus.write_text(good + '{"_id": "x"\n')
    with pytest.raises(InputError, match=r":100: expected JSON"):
        encode(out)
    written = (out / "00001.npy").stat().st_mtime_ns
    # A row that is stored is another's.
    corpus.write_text(good.replace('"d7"', '"e7"', 1))
    with pytest.raises(InputError, match="begun with another source"):
        encode(out)
    corpus.write_text(good + '{"_id": "x", "text": "mended"}\n')
    assert encode(out).rows == 100 and (out / "00001.npy").stat().st_mtime_ns == written
    assert encode(out).source["sha256"] == corpus_source(corpus)["sha256"]
    encode(tmp_path / "anew")
    assert stored(out) == stored(tmp_path / "anew")


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
        encode_passages(towers, read_passages(corpus), out, EncodeOptions(), source=source, dtype="float16")
    assert stored(out) == before


def test_model_is_the_same_one_after_it_was_used(minilm: str) -> None:
    towers = load_towers(minilm)
    before = towers.fingerprint()
    embed_texts(towers, ["a cat"], "query", EncodeOptions())
    assert towers.fingerprint() == before


def test_process_killed_at_any_moment_leaves_a_store_that_goes_on(towers: Towers, tmp_path: Path) -> None:
    """The real command and SIGKILL: what stands on disk is a multiple of a shard, and the end is the same bytes."""
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
        [sys.executable, "-m", "retriever", *arguments, "--out", str(tmp_path / "cut")], env=env, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "cut" / "00001.npy").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    with pytest.raises(InputError, match=r"incomplete, [1-9]\d*00 rows so far"):
        EmbeddingStore.open(tmp_path / "cut")
    for name in ("cut", "whole"):
        outcome = command(*arguments, "--out", tmp_path / name)
        assert outcome.code == 0, outcome.err
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")


def test_loaded_model_gives_the_vectors_of_the_one_saved(towers: Towers, texts: list[str], tmp_path: Path) -> None:
    towers.save(tmp_path)
    loaded = load_towers(str(tmp_path))
    assert loaded.fingerprint() == towers.fingerprint()
    np.testing.assert_array_equal(
        embed_texts(loaded, texts, "query", EncodeOptions()), embed_texts(towers, texts, "query", EncodeOptions())
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_make_the_store_that_threads_make(
    towers: Towers, corpus: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever.encoding.windows.FIRST_WINDOW", 4)
    monkeypatch.setattr("retriever.encoding.window_workers.PIECE", 3)
    options: dict[str, Any] = {"source": corpus_source(corpus), "shard_rows": 16, "window": 10}
    encoding = EncodeOptions(micro_batch_tokens=200)
    encode_passages(towers, read_passages(corpus), tmp_path / "threads", encoding, **options)
    out = tmp_path / "workers"
    torn = list(read_passages(corpus))
    torn[50] = dataclasses.replace(torn[50], id="two words")
    with pytest.raises(InputError, match=f"^{out}: row 50: expected an id without white space, found 'two words'$"):
        encode_passages(towers, torn, out, encoding, workers=workers, **options)
    # Shards before it are whole; one window was still on its way.
    assert len(list(out.glob("*.npy"))) == 2
    progress: list[int] = []
    encode_passages(towers, read_passages(corpus), out, encoding, workers=workers, progress=progress.append, **options)
    assert progress[0] == 32 and sum(progress) == 99
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "threads").iterdir()
    }


@pytest.mark.parametrize("workers", [0, 3])
def test_a_bad_line_is_named_and_odd_passages_are_counted(
    towers: Towers, corpus: Path, tmp_path: Path, workers: int
) -> None:
    lines = corpus.read_text(encoding="utf-8").splitlines()
    lines[20] = json.dumps({"_id": "empty", "text": ""})
    found: list[tuple[str, str]] = []
    options: dict[str, Any] = {
        "source": {"name": "c"},
        "window": 8,
        "workers": workers,
        "notice": lambda *a: found.append(a),
    }
    (path := tmp_path / "odd.jsonl").write_text("\n".join(lines), encoding="utf-8")
    encode_passages(towers, read_passages(path), tmp_path / "odd", EncodeOptions(), **options)
    assert found[0] == ("passages without any text", "empty")
    lines[70] = "{"
    (path := tmp_path / "bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match=rf"^{path}:71: expected JSON, found: [^\n]*$"):
        encode_passages(towers, read_passages(path), tmp_path / "bad", EncodeOptions(), **options)


def test_nothing_is_written_after_a_passage_that_is_refused(towers: Towers, corpus: Path, tmp_path: Path) -> None:
    passages, source = list(read_passages(corpus)), corpus_source(corpus)
    options: dict[str, Any] = {"source": source, "shard_rows": 10, "window": 5}
    twice = [*passages[:22], dataclasses.replace(passages[22], id=passages[3].id), *passages[23:]]
    with pytest.raises(InputError, match="rows 3 and 22"):
        encode_passages(towers, twice, tmp_path / "store", EncodeOptions(), **options)
    store = encode_passages(towers, passages, tmp_path / "store", EncodeOptions(), **options)
    assert list(store.ids()) == [passage.id for passage in passages]


def test_a_corpus_is_embedded_with_the_prompt(tiny: ModelConfig, corpus: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    towers = build_towers(dataclasses.replace(tiny, passage_prompt="cat: ")).eval()
    source, options = corpus_source(corpus), EncodeOptions()
    store = encode_passages(towers, read_passages(corpus), tmp_path / "store", options, source=source, window=10)
    stored = store.vectors()
    texts = ["cat: " + passage.content for passage in read_passages(corpus)]
    expected = towers.model.encode(texts, prompt="", normalize_embeddings=False)
    np.testing.assert_allclose(stored, expected, atol=1e-5)
