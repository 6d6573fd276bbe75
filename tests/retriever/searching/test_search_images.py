"""Search across modalities, and the images on the search page."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from cli_helpers import assert_refused, command, write_lines
from image_helpers import COLORS, SHAPES, cache_as_hub_name, draw, save_checkpoint, write_tar
from PIL import Image
from serve_helpers import serving

from index.ann.index import Index
from index.files import InputError
from index.store.reader import EmbeddingStore
from retriever.encoding import image_store
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.image_encoder import embed_images
from retriever.models.images.towers import load_image_text_towers
from retriever.searching.search import Result

pytest.importorskip("starlette")
from starlette.requests import Request

from retriever.serve.thumbnails import Thumbnails


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP checkpoint, a folder of images with subfolders, their store and index, and an index of texts."""
    root = tmp_path_factory.mktemp("images")
    save_checkpoint("clip", root / "model")
    for color in COLORS[:4]:
        (root / "drawn" / f"{color} ones").mkdir(parents=True)
        for shape in SHAPES:
            draw(color, shape).save(root / "drawn" / f"{color} ones" / f"{shape}.png")
    (root / "drawn" / "broken.jpg").write_bytes(b"not an image")
    (root / "secret.png").write_bytes((root / "drawn" / "red ones" / "circle.png").read_bytes())
    done = command("encode", "--model", root / "model", "--data", root / "drawn", "--out", root / "store", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"] == 16
    assert "drawn: left out: broken.jpg: expected" in done.err
    texts = [{"_id": f"t{n}", "text": f"a {color} thing"} for n, color in enumerate(COLORS)]
    corpus = write_lines(root / "texts.jsonl", texts)
    assert command("encode", "--model", root / "model", "--data", corpus, "--out", root / "texts").code == 0
    for store, index in (("store", "index"), ("texts", "text-index")):
        assert command("index", "build", "--embeddings", root / store, "--out", root / index).code == 0
    return root


def answers_of(world: Path, index: str, *queries: object) -> list[dict[str, Any]]:
    done = command("search", "--model", world / "model", "--index", world / index, "--k", 3, "--json", *queries)
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_the_store_of_an_image_folder_equals_embed_images(world: Path) -> None:
    store = EmbeddingStore.open(world / "store")
    passages = list(store.passages())
    assert passages[0].id == quote(passages[0].text) == "blue%20ones/circle.png"
    towers = load_image_text_towers(str(world / "model"))
    expected = embed_images(towers, [world / "drawn" / passage.text for passage in passages], EncodeOptions())
    assert np.allclose(store.vectors(), expected, atol=1e-6)


def test_an_interrupted_store_of_images_is_continued_past_broken_ones(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_store, "DECODE_BATCH", 4)
    arguments = ["encode", "--model", world / "model", "--data", world / "drawn", "--shard-rows", 5]
    assert command(*arguments, "--out", tmp_path / "complete").code == 0
    batches, embed = [], image_store.embed_pixels

    def interrupted(*args: Any) -> np.ndarray:
        batches.append(1)
        if len(batches) == 4:
            raise KeyboardInterrupt
        return embed(*args)

    with monkeypatch.context() as patch:
        patch.setattr(image_store, "embed_pixels", interrupted)
        assert command(*arguments, "--out", tmp_path / "interrupted").code != 0
    # Of three batches, with the broken image, two shards are complete.
    assert len(list((tmp_path / "interrupted").glob("*.npy"))) == 2
    assert command(*arguments, "--out", tmp_path / "interrupted").code == 0
    complete, continued = (EmbeddingStore.open(tmp_path / name) for name in ("complete", "interrupted"))
    assert list(complete.ids()) == list(continued.ids())
    assert np.allclose(complete.vectors(), continued.vectors(), atol=1e-6)


def test_a_text_retrieves_images_with_their_paths(world: Path) -> None:
    [answer] = answers_of(world, "index", "a red circle")
    assert len(answer["results"]) == 3
    for result in answer["results"]:
        assert (world / "drawn" / result["text"]).is_file()


def test_an_image_retrieves_itself_and_texts(world: Path) -> None:
    files = [world / "drawn" / "red ones" / "cross.png", world / "drawn" / "blue ones" / "stripe.png"]
    answers = answers_of(world, "index", "--image", files[0], "--image", files[1])
    assert [answer["query"] for answer in answers] == [str(file) for file in files]
    assert [answer["results"][0]["text"] for answer in answers] == ["red ones/cross.png", "blue ones/stripe.png"]
    assert answers[0]["results"][0]["score"] == pytest.approx(1.0, abs=1e-5)
    [answer] = answers_of(world, "text-index", "--image", files[0])
    assert answer["results"][0]["id"].startswith("t")


def test_a_hub_name_gives_the_same_as_a_folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = ["--model", cache_as_hub_name(world / "model", tmp_path)]
    done = command("encode", *model, "--data", world / "drawn", "--out", tmp_path / "store")
    assert done.code == 0, done.err
    assert np.array_equal(
        EmbeddingStore.open(tmp_path / "store").vectors(), EmbeddingStore.open(world / "store").vectors()
    )
    query = ["--index", world / "index", "--json", "a red circle"]
    by_name, by_folder = (command("search", *flag, *query) for flag in (model, ["--model", world / "model"]))
    assert by_name.code == 0, by_name.err
    assert by_name.out == by_folder.out


def test_invalid_image_arguments_are_one_line_errors(world: Path, minilm: str, tmp_path: Path) -> None:
    index = ["--index", world / "index"]
    model = ["--model", world / "model"]
    assert_refused(command("search", *model, *index, "--image", world / "gone.png"), 1, r"gone\.png: no such file")
    broken = world / "drawn" / "broken.jpg"
    assert_refused(command("search", *model, *index, "--image", broken), 1, r"broken\.jpg: expected a")
    assert_refused(command("search", *model, *index, "--image", broken, "words"), 2, "--image: give .* or texts")
    assert_refused(command("search", "--model", minilm, *index, "--image", broken), 1, "expected queries of the model")
    (tmp_path / "empty").mkdir()
    words = ["encode", *model, "--data", tmp_path / "empty", "--out", tmp_path / "out"]
    assert_refused(command(*words), 1, r"empty: expected images \(\.jpg")
    words = ["encode", "--model", minilm, "--data", world / "drawn", "--out", tmp_path / "out"]
    assert_refused(command(*words), 1, "drawn: expected a corpus for ")
    words[2] = "acme/none"
    assert_refused(command(*words), 1, "acme/none: no such folder, and not in the cache of the hub")
    words = ["serve", *model, *index, "--port", 0, "--images"]
    assert_refused(command(*words, tmp_path / "gone"), 1, "gone: no such file")
    assert_refused(command(*words, tmp_path / "empty"), 1, r"empty: expected images \(\.jpg")


def get_image(port: int, url: str) -> tuple[int, bytes, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", url)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content, response.getheader("content-type", "")


def test_the_service_shows_thumbnails_of_indexed_images_and_no_other_files(world: Path) -> None:
    outside = world / "drawn" / "red ones" / "stripe.png"
    os.replace(outside, world / "moved.png")
    # An indexed image is replaced by a link out of the folder.
    outside.symlink_to(world / "secret.png")
    try:
        with serving(world / "model", world / "index", "--images", world / "drawn") as server:
            _, page, headers = server.ask("GET", "/?q=a+red+circle&k=5")
            urls = [part.partition('"')[0].replace("&amp;", "&") for part in page.split('src="')[1:]]
            assert len(urls) == 5 and all(url.startswith("/image?id=") for url in urls)
            assert "img-src 'self'" in headers["content-security-policy"]
            shown = [get_image(server.port, url) for url in urls]
            good = [content for status, content, kind in shown if status == 200 and kind == "image/jpeg"]
            assert len(good) >= 4
            assert max(Image.open(io.BytesIO(good[0])).size) == 48
            unknown = ("../secret.png", "broken.jpg", "/etc/passwd", "", "gold%20ones/circle.png")
            for id_ in (*unknown, "red%20ones/stripe.png"):
                status, content, kind = get_image(server.port, f"/image?{urlencode({'id': id_})}")
                assert status == 404 and kind == "application/json", id_
                assert b"expected the id of an image" in content
            for path in ("/image", "/image/../secret.png", "/image/..%2fsecret.png"):
                assert get_image(server.port, path)[0] == 404
    finally:
        os.replace(world / "moved.png", outside)


def test_images_of_a_table_are_found_by_their_path_not_by_their_caption(world: Path, tmp_path: Path) -> None:
    rows = [{"file_name": f"drawn/{color} ones/cross.png", "caption": f"a {color} cross, 100%"} for color in COLORS[:3]]
    table = write_lines(world / "captions.jsonl", rows)
    done = command("encode", "--model", world / "model", "--data", table, "--out", tmp_path / "store")
    assert done.code == 0, done.err
    assert command("index", "build", "--embeddings", tmp_path / "store", "--out", tmp_path / "index").code == 0
    index = Index.open(tmp_path / "index")
    assert index.passage(0).text == rows[0]["caption"]
    thumbnails = Thumbnails(world, index)
    for row in range(3):
        url = thumbnails.url(Result(1, 0.0, index.ids[row], "", ""))
        scope = {"type": "http", "headers": [], "query_string": url.partition("?")[2].encode()}
        shown = asyncio.run(thumbnails.show(Request(scope))).body
        expected = Image.open(world / rows[row]["file_name"]).convert("RGB")
        found = np.asarray(Image.open(io.BytesIO(bytes(shown))), np.int64)
        assert np.abs(found - np.asarray(expected, np.int64)).mean() < 8
    with pytest.raises(InputError, match="expected images"):
        Thumbnails(tmp_path, index)
    with pytest.raises(InputError, match="expected the images that were indexed, found no 'drawn/"):
        Thumbnails(world / "drawn", index)


def test_images_of_tars_and_tables_with_ids_are_shown(world: Path, tmp_path: Path) -> None:
    drawn = [world / "drawn" / f"{color} ones" / "cross.png" for color in COLORS[:3]]
    members = [
        (f"{row}.{part}", content)
        for row, file in enumerate(drawn)
        for part, content in (("png", file.read_bytes()), ("txt", b"a cross"))
    ]
    write_tar(tmp_path / "set" / "0.tar", members)
    rows = [{"_id": f"n{row}", "image": f"../drawn/{file.parent.name}/{file.name}"} for row, file in enumerate(drawn)]
    (world / "tables").mkdir()
    outside = write_lines(world / "tables" / "named.jsonl", rows)
    inside = write_lines(world / "named.jsonl", [{**row, "image": row["image"].removeprefix("../")} for row in rows])
    for number, (data, visible) in enumerate(((tmp_path / "set", True), (inside, True), (outside, False))):
        store, index = tmp_path / f"store {number}", tmp_path / f"index {number}"
        assert command("encode", "--model", world / "model", "--data", data, "--out", store).code == 0
        assert command("index", "build", "--embeddings", store, "--out", index).code == 0
        opened = Index.open(index)
        if not visible:
            with pytest.raises(InputError, match="expected the images that were indexed, found no 'n0'"):
                Thumbnails(data, opened)
            continue
        thumbnails = Thumbnails(data, opened)
        for row, file in enumerate(drawn):
            url = thumbnails.url(Result(1, 0.0, opened.ids[row], "", ""))
            scope = {"type": "http", "headers": [], "query_string": url.partition("?")[2].encode()}
            shown = Image.open(io.BytesIO(bytes(asyncio.run(thumbnails.show(Request(scope))).body)))
            expected = Image.open(file).convert("RGB")
            assert np.abs(np.asarray(shown, np.int64) - np.asarray(expected, np.int64)).mean() < 8


def test_without_the_flag_the_service_shows_no_images(world: Path) -> None:
    with serving(world / "model", world / "index") as server:
        _, page, _ = server.ask("GET", "/?q=red")
        assert "<img" not in page
        assert get_image(server.port, "/image?id=blue%2520ones%2Fcircle.png")[0] == 404
