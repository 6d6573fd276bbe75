"""Across modalities: texts find pictures, and pictures texts; the page shows pictures of its own index alone."""

from __future__ import annotations

import http.client
import io
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from cli_helpers import assert_refused, command, write_lines
from image_helpers import COLOURS, SHAPES, cache_as_hub_name, draw, save_checkpoint
from PIL import Image
from serve_helpers import serving

from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.image_encoder import embed_images
from retriever.models.images.towers import load_image_text_towers


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP checkpoint, a folder of pictures in folders, their store and index, and an index of texts."""
    root = tmp_path_factory.mktemp("pictures")
    save_checkpoint("clip", root / "model")
    for colour in COLOURS[:4]:
        (root / "drawn" / f"{colour} ones").mkdir(parents=True)
        for shape in SHAPES:
            draw(colour, shape).save(root / "drawn" / f"{colour} ones" / f"{shape}.png")
    (root / "drawn" / "broken.jpg").write_bytes(b"no picture")
    (root / "secret.png").write_bytes((root / "drawn" / "red ones" / "circle.png").read_bytes())
    done = command("encode", "--model", root / "model", "--data", root / "drawn", "--out", root / "store", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"] == 16
    assert "drawn: left out: broken.jpg: expected an image" in done.err
    texts = [{"_id": f"t{n}", "text": f"a {colour} thing"} for n, colour in enumerate(COLOURS)]
    corpus = write_lines(root / "texts.jsonl", texts)
    assert command("encode", "--model", root / "model", "--data", corpus, "--out", root / "texts").code == 0
    for store, index in (("store", "index"), ("texts", "text-index")):
        assert command("index", "build", "--embeddings", root / store, "--out", root / index).code == 0
    return root


def found(world: Path, index: str, *words: object) -> list[dict[str, Any]]:
    done = command("search", "--model", world / "model", "--index", world / index, "--k", 3, "--json", *words)
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_a_folder_of_pictures_is_embedded_as_the_towers_embed_its_files(world: Path) -> None:
    store = EmbeddingStore.open(world / "store")
    passages = list(store.passages())
    assert passages[0].id == quote(passages[0].text) == "blue%20ones/circle.png"
    towers = load_image_text_towers(str(world / "model"))
    expected = embed_images(towers, [world / "drawn" / passage.text for passage in passages], EncodeOptions())
    assert np.allclose(store.vectors(), expected, atol=1e-6)


def test_an_interrupted_encode_goes_on_past_broken_pictures(world: Path, tmp_path: Path) -> None:
    words = ["encode", "--model", world / "model", "--data", world / "drawn", "--shard-rows", 5]
    assert command(*words, "--out", tmp_path / "whole").code == 0
    written: list[int] = []
    write = EmbeddingWriter._write_shard

    def failing(self: EmbeddingWriter, *, complete: bool) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(1)
        write(self, complete=complete)

    with mock.patch.object(EmbeddingWriter, "_write_shard", failing):
        assert command(*words, "--out", tmp_path / "cut").code != 0
    assert written == [1, 1]
    assert command(*words, "--out", tmp_path / "cut").code == 0
    whole, cut = EmbeddingStore.open(tmp_path / "whole"), EmbeddingStore.open(tmp_path / "cut")
    assert list(whole.ids()) == list(cut.ids())
    assert np.allclose(whole.vectors(), cut.vectors(), atol=1e-6)


def test_a_text_finds_pictures_and_the_hits_name_their_files(world: Path) -> None:
    [answer] = found(world, "index", "a red circle")
    assert len(answer["results"]) == 3
    for result in answer["results"]:
        assert (world / "drawn" / result["text"]).is_file()


def test_a_picture_finds_itself_and_texts(world: Path) -> None:
    files = [world / "drawn" / "red ones" / "cross.png", world / "drawn" / "blue ones" / "stripe.png"]
    answers = found(world, "index", "--image", files[0], "--image", files[1])
    assert [answer["query"] for answer in answers] == [str(file) for file in files]
    assert [answer["results"][0]["text"] for answer in answers] == ["red ones/cross.png", "blue ones/stripe.png"]
    assert answers[0]["results"][0]["score"] == pytest.approx(1.0, abs=1e-5)
    [answer] = found(world, "text-index", "--image", files[0])
    assert answer["results"][0]["id"].startswith("t")


def test_a_hub_name_serves_as_a_folder_does(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = ["--model", cache_as_hub_name(world / "model", tmp_path)]
    done = command("encode", *model, "--data", world / "drawn", "--out", tmp_path / "store")
    assert done.code == 0, done.err
    assert np.array_equal(
        EmbeddingStore.open(tmp_path / "store").vectors(), EmbeddingStore.open(world / "store").vectors()
    )
    asked = ["--index", world / "index", "--json", "a red circle"]
    by_name, by_folder = (command("search", *who, *asked) for who in (model, ["--model", world / "model"]))
    assert by_name.code == 0, by_name.err
    assert by_name.out == by_folder.out


def test_mistakes_about_pictures_are_said_in_one_line(world: Path, minilm: str, tmp_path: Path) -> None:
    index = ["--index", world / "index"]
    model = ["--model", world / "model"]
    assert_refused(command("search", *model, *index, "--image", world / "gone.png"), 1, r"gone\.png: no such file")
    broken = world / "drawn" / "broken.jpg"
    assert_refused(command("search", *model, *index, "--image", broken), 1, r"broken\.jpg: expected an image")
    assert_refused(command("search", *model, *index, "--image", broken, "words"), 2, "--image: give pictures or texts")
    assert_refused(command("search", "--model", minilm, *index, "--image", broken), 1, "expected queries of the model")
    (tmp_path / "empty").mkdir()
    words = ["encode", *model, "--data", tmp_path / "empty", "--out", tmp_path / "out"]
    assert_refused(command(*words), 1, r"empty: expected pictures \(\.jpg")
    words = ["encode", "--model", minilm, "--data", world / "drawn", "--out", tmp_path / "out"]
    assert_refused(command(*words), 1, "drawn: expected a corpus for .*, which embeds texts alone, found a folder of p")
    words[2] = "acme/none"
    assert_refused(command(*words), 1, "acme/none: no such folder, and no such model on the hub")
    words = ["serve", *model, *index, "--port", 0, "--pictures"]
    assert_refused(command(*words, tmp_path / "gone"), 1, "gone: no such folder")
    assert_refused(command(*words, tmp_path / "empty"), 1, "expected the folder whose pictures were indexed")


def picture_at(port: int, address: str) -> tuple[int, bytes, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", address)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content, response.getheader("content-type", "")


def test_the_page_shows_thumbnails_of_its_own_index_and_no_other_file(world: Path) -> None:
    outside = world / "drawn" / "red ones" / "stripe.png"
    os.replace(outside, world / "moved.png")
    # A picture that was indexed and is now a link out of the folder.
    outside.symlink_to(world / "secret.png")
    try:
        with serving(world / "model", world / "index", "--pictures", world / "drawn") as server:
            _, page, headers = server.ask("GET", "/?q=a+red+circle&k=5")
            addresses = [part.partition('"')[0].replace("&amp;", "&") for part in page.split('src="')[1:]]
            assert len(addresses) == 5 and all(address.startswith("/picture?id=") for address in addresses)
            assert "img-src 'self'" in headers["content-security-policy"]
            shown = [picture_at(server.port, address) for address in addresses]
            good = [content for status, content, kind in shown if status == 200 and kind == "image/jpeg"]
            assert len(good) >= 4
            assert max(Image.open(io.BytesIO(good[0])).size) == 48
            strangers = ("../secret.png", "broken.jpg", "/etc/passwd", "", "gold%20ones/circle.png")
            for bad in (*strangers, "red%20ones/stripe.png"):
                status, content, kind = picture_at(server.port, f"/picture?{urlencode({'id': bad})}")
                assert status == 404 and kind == "application/json", bad
                assert b"expected the id of a picture" in content
            for path in ("/picture", "/picture/../secret.png", "/picture/..%2fsecret.png"):
                assert picture_at(server.port, path)[0] == 404
    finally:
        os.replace(world / "moved.png", outside)


def test_without_the_flag_there_are_no_pictures(world: Path) -> None:
    with serving(world / "model", world / "index") as server:
        _, page, _ = server.ask("GET", "/?q=red")
        assert "<img" not in page
        assert picture_at(server.port, "/picture?id=blue%2520ones%2Fcircle.png")[0] == 404
