"""Hybrid search is the fusion of the evaluation; changed indexes are taken into use; images as queries; the page."""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("bm25s")
from cli_helpers import MEANINGS, command, write_lines
from image_helpers import image_bytes, noise, save_checkpoint
from in_thread import Running, running

from eval.bm25.search import bm25_run
from eval.fusion import fuse
from index.ann.edit import delete_passages
from index.ann.index import Index
from index.fields.filters import Filter
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.models.modality import load_towers
from retriever.models.towers import Towers
from retriever.searching.hybrid import HybridIndex
from retriever.serve.app import make_app
from retriever.serve.batching import Batching, Engine
from retriever.serve.excerpts import marked_excerpt
from retriever.serve.reload import Reloader
from retriever.serve.requests import Limits

QUERIES = ["large tree that bears acorns", "the sea and water", "zzz"]


@pytest.fixture(scope="module")
def towers(world: Any) -> Towers:
    return load_towers(str(world.model))


@pytest.fixture(scope="module")
def folder(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index whose passages have fields."""
    folder = tmp_path_factory.mktemp("live")
    rows: list[object] = [
        {"_id": f"d{n}", "title": f"<b>{word}", "text": f"{text} " + "& more " * (80 if n == 2 else 0), "n": n}
        for n, (word, text) in enumerate(MEANINGS.items())
    ]
    corpus = write_lines(folder / "corpus.jsonl", rows)
    flags = ("--model", world.model, "--data", corpus, "--out", folder / "embeddings", "--fields", "n")
    assert command("encode", *flags).code == 0
    assert command("index", "build", "--embeddings", folder / "embeddings", "--out", folder / "index").code == 0
    return folder / "index"


@pytest.fixture(scope="module")
def service(towers: Towers, folder: Path) -> Iterator[Running]:
    index = Index.open(folder)
    with (
        Engine(towers, index, EncodeOptions(), Batching(), hybrid=HybridIndex(index)) as engine,
        running(make_app(engine, Limits(), lambda line: None, name="m")) as service,
    ):
        yield service


@pytest.mark.parametrize("method", ["rrf", "minmax"])
def test_hybrid_search_is_the_fusion_of_the_evaluation(towers: Towers, folder: Path, method: Any) -> None:
    index = Index.open(folder)
    hybrid = HybridIndex(index, method, 0.7)
    vectors = embed_texts(towers, QUERIES, "query", EncodeOptions())
    named = {str(n): text for n, text in enumerate(QUERIES)}
    passages = [index.passage(row) for row in range(index.rows)]
    scores, ids = index.search(vectors, 100)
    dense = {q: dict(zip(i, s, strict=True)) for q, i, s in zip(named, ids.tolist(), scores.tolist(), strict=True)}
    lexical = bm25_run(passages, named)
    expected = fuse([dense, lexical], method, weights=[0.7, 0.3], k=5)
    found_scores, found_rows = hybrid.search_rows(QUERIES, vectors, 5)
    for number, ranking in enumerate(expected.values()):
        assert [index.ids[row] for row in found_rows[number].tolist()] == list(ranking)
        np.testing.assert_allclose(found_scores[number], list(ranking.values()), rtol=1e-6)
    scores, rows = hybrid.search_rows(QUERIES, vectors, 3, Filter({"n": {"$gte": 10}}), "hybrid")
    assert rows.min() >= 10
    _, rows = hybrid.search_rows(QUERIES, vectors, 3, Filter({"n": {"$lt": 10}}), "bm25")
    assert rows[0, 0] == 2 and (rows[2] == -1).all() and rows.max() < 10


def test_requests_choose_how_to_rank(service: Running) -> None:
    answers = {
        mode: ask(service, "/search", {"query": "the sea and water", "mode": mode, "k": 20})[1]["results"]
        for mode in ("dense", "bm25", "hybrid")
    }
    assert len(answers["dense"]) == len(answers["hybrid"]) == 20 and 0 < len(answers["bm25"]) < 5
    default = ask(service, "/search", {"query": "the sea and water", "k": 20})[1]["results"]
    assert default == answers["hybrid"] != answers["dense"]
    assert ask(service, "/search", {"query": "x", "mode": "sparse"})[0] == 422
    assert "the model does not embed images" in ask(service, "/search", {"image": png(1)})[1]["error"]


def test_a_changed_index_is_served_without_a_failed_request(towers: Towers, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "index"
    shutil.copytree(folder, place)
    old = Index.open(place)
    reports: list[tuple[str, str]] = []
    with Engine(towers, old, EncodeOptions(), Batching(timeout_s=0)) as engine:

        def reopen() -> Index:
            index = Index.open(place)
            engine.replace(index)
            return index

        futures: list[Future[Any]] = []
        done = threading.Event()

        def ask_on() -> None:
            while not done.is_set():
                futures.append(engine.submit(["a tree"], 20, Filter({"n": {"$gte": 0}})))
                futures[-1].exception()

        asking = threading.Thread(target=ask_on)
        asking.start()
        try:
            with Reloader([place], 0.02, reopen, lambda *report: reports.append(report)):
                for count, ids in ((19, ["d0"]), (17, ["d1", "d5"])):
                    delete_passages(place, ids)
                    wait_for(lambda count=count: engine.index.rows == count)
                    answer = engine.submit(["a tree"], 20).result()[0]
                    assert len(answer.results) == count and not {r.id for r in answer.results} & set(ids)
                    assert all(r.text.split()[0] == MEANINGS[r.title[3:]].split()[0] for r in answer.results)
                # A damaged index is reported, and the old one kept.
                shutil.copytree(place, tmp_path / "damaged")
                (tmp_path / "damaged" / "index.faiss").write_bytes(b"x")
                shutil.rmtree(place)
                (tmp_path / "damaged").rename(place)
                wait_for(lambda: reports[-1][0] == "failed")
                assert len(engine.submit(["a tree"], 20).result()[0].results) == 17
        finally:
            done.set()
            asking.join()
    assert futures and [future.exception() for future in futures if future.exception()] == []
    # The files of the first index stay those of the first index, although their names are gone.
    assert old.passage(19).id == "d19" and old.ids[0] == "d0" and old.matching(Filter({"n": 0})).sum() == 1
    assert [outcome for outcome, _ in reports] == ["done", "done", "failed"]
    assert "17 passages are served" in reports[1][1] and "index.faiss" in reports[2][1]


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_page_marks_words_and_shows_filters_and_facts(service: Running) -> None:
    status, text = get(service, "/?q=ACORNS+%3Cb%3E+more&k=5&filter=n%3C10&mode=bm25")
    assert status == 200
    assert "<mark>acorns</mark>" in text and "&lt;b&gt;oak" in text and "<b>" not in text and "<script" not in text
    assert "&amp; <mark>more</mark>" in text and 'value="n&lt;10"' in text and "n (integer)" in text
    assert '<option value="bm25" selected>' in text and "model: m" in text and "index: Flat" in text
    # The long passage is shortened, and shown whole in an element that a key opens.
    assert text.count("<details>") == 1 and text.count("…") == 1
    status, text = get(service, "/?q=x&filter=m%3D1")
    assert status == 422 and "field: expected one of n, found &#39;m&#39;" in text


def test_excerpts_show_where_the_words_are() -> None:
    assert marked_excerpt("A tower, TOWERS tall", "the tower is tall") == [
        ("A ", False), ("tower", True), (", TOWERS ", False), ("tall", True),
    ]  # fmt: skip
    text = "word " * 300 + "needle in hay " + "word " * 300
    pieces = marked_excerpt(text, "a needle in the hay")
    assert [piece for piece, marked in pieces if marked] == ["needle", "in", "hay"]
    assert pieces[0] == pieces[-1] == ("…", False) and len("".join(piece for piece, _ in pieces)) < 330
    assert "".join(piece for piece, _ in marked_excerpt("x" * 1000, "")) == "x" * 160 + "…"
    assert marked_excerpt("", "q") == []


def test_images_and_images_with_texts_are_queries(tmp_path: Path) -> None:
    from retriever.encoding.model import load

    model, images = tmp_path / "model", tmp_path / "images"
    save_checkpoint("clip", model)
    images.mkdir()
    seeds = {"red": 1, "green": 2, "blue": 3}
    for name, seed in seeds.items():
        (images / f"{name}.png").write_bytes(base64.b64decode(png(seed)))
    flags = ("--model", model, "--data", images, "--out", tmp_path / "embeddings")
    assert command("encode", *flags).code == 0
    assert command("index", "build", "--embeddings", tmp_path / "embeddings", "--out", tmp_path / "index").code == 0
    loaded = load(model, device="cpu")
    with (
        Engine(loaded.towers, Index.open(tmp_path / "index"), loaded.options, Batching()) as engine,
        running(make_app(engine, Limits(), lambda line: None)) as service,
    ):
        for name, seed in seeds.items():
            status, answer = ask(service, "/search", {"image": png(seed), "k": 1})
            assert status == 200 and answer["results"][0]["id"] == f"{name}.png", answer
            assert answer["results"][0]["score"] == pytest.approx(1, abs=1e-4)
        both = ask(service, "/search", {"image": png(seeds["red"]), "query": "a b c", "k": 3})[1]["results"]
        mean = loaded.encode_queries(["a b c"]) + loaded.encode_images([images / "red.png"])
        expected = loaded.encode_images([images / f"{Path(each['id']).stem}.png" for each in both]) @ mean[0]
        np.testing.assert_allclose([r["score"] for r in both], expected / np.linalg.norm(mean), atol=1e-5)
        for wrong in ("!", base64.b64encode(b"GIF89a").decode(), 5):
            assert ask(service, "/search", {"image": wrong})[0] == 422
        assert ask(service, "/search", {"query": "x", "image": png(1), "mode": "hybrid"})[0] == 422
        status, text = get(service, "/")
        assert 'enctype="multipart/form-data"' in text and 'type="file"' in text
        status, text = post_form(service, {"q": "", "k": "2"}, base64.b64decode(png(seeds["blue"])))
        assert status == 200 and re.search(r'class="id">(\w+)', text)[1] == "blue"  # type: ignore[index]
        assert post_form(service, {"q": "", "k": "2"}, b"no image")[0] == 422


def png(seed: int) -> str:
    """An image of noise as a PNG file in base64."""
    return base64.b64encode(image_bytes(noise(40, 30, seed))).decode()


def ask(service: Running, path: str, body: object) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request("POST", path, json.dumps(body))
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def get(service: Running, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def post_form(service: Running, fields: dict[str, str], image: bytes) -> tuple[int, str]:
    part = 'content-disposition: form-data; name="{}"'
    parts = [f"{part.format(name)}\r\n\r\n{value}".encode() for name, value in fields.items()]
    parts.append(f'{part.format("image")}; filename="x.png"\r\ncontent-type: image/png\r\n\r\n'.encode() + image)
    body = b"".join(b"--edge\r\n" + each + b"\r\n" for each in parts) + b"--edge--\r\n"
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request("POST", "/", body, {"content-type": "multipart/form-data; boundary=edge"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text
