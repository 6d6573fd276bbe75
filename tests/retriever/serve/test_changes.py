"""Passages are added and deleted over HTTP: on disk, served at once, and never half in a concurrent answer."""

from __future__ import annotations

import http.client
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from cli_helpers import MEANINGS, command, write_lines
from in_thread import Running, running

from index.ann.index import Index
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.models.modality import load_towers
from retriever.models.towers import Towers
from retriever.serve.app import make_app
from retriever.serve.batching import Batching, Engine
from retriever.serve.changes import Changes
from retriever.serve.reload import Reloader
from retriever.serve.requests import Limits

FACTORIES = ("Flat", "IVF2,Flat", "HNSW8")
NEW = [{"_id": f"new{n}", "title": "a new", "text": f"passage {n}", "meta": {"n": 100 + n}} for n in range(3)]


@pytest.fixture(scope="module")
def towers(world: Any) -> Towers:
    return load_towers(str(world.model))


@pytest.fixture(scope="module")
def folder(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index of each type; the passages have the field meta.n."""
    folder = tmp_path_factory.mktemp("changes")
    rows: list[object] = [
        {"_id": f"d{n}", "title": word, "text": text, "meta": {"n": n}}
        for n, (word, text) in enumerate(MEANINGS.items())
    ]
    corpus = write_lines(folder / "corpus.jsonl", rows)
    flags = ("--model", world.model, "--data", corpus, "--out", folder / "embeddings", "--fields", "meta.n")
    assert command("encode", *flags).code == 0
    for factory in FACTORIES:
        out = ("--embeddings", folder / "embeddings", "--out", folder / factory, "--factory", factory)
        assert command("index", "build", *out).code == 0
    return folder


@contextmanager
def served(towers: Towers, place: Path, token: str | None = None) -> Iterator[tuple[Running, list[str]]]:
    """The index in `place` with its /add and /delete, and the lines of the log."""
    index, log = Index.open(place), []
    with Engine(towers, index, EncodeOptions(), Batching(timeout_s=0)) as engine:

        def reopen() -> Index:
            opened = Index.open(place)
            engine.replace(opened)
            return opened

        reloader = Reloader([place], 60, reopen, lambda *report: log.append(report[1]))
        with (
            Changes(engine, index, Limits(inputs=8), reloader.look, log.append) as changes,
            running(make_app(engine, Limits(), log.append, token=token, changes=changes)) as service,
        ):
            yield service, log


def post(service: Running, path: str, body: object, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json", **headers})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


@pytest.mark.parametrize("factory", FACTORIES)
def test_changes_are_served_at_once_and_answers_belong_to_one_state(
    towers: Towers, folder: Path, tmp_path: Path, factory: str
) -> None:
    place = tmp_path / "index"
    shutil.copytree(folder / factory, place)
    answers: list[Any] = []
    done = threading.Event()
    with served(towers, place) as (service, _):

        def ask_on() -> None:
            while not done.is_set():
                answers.append(post(service, "/search", {"query": "a new tree", "k": 100}))

        asking = [threading.Thread(target=ask_on) for _ in range(3)]
        for thread in asking:
            thread.start()
        try:
            status, added = post(service, "/add", {"passages": NEW})
            assert status == 200 and (added["added"], added["passages"]) == (3, 23), added
            found = post(service, "/search", {"query": "a new tree", "k": 100, "filter": {"meta.n": {"$gte": 100}}})
            assert {each["id"] for each in found[1]["results"]} == {"new0", "new1", "new2"}
            # A client that repeats a request, because it got no answer, adds nothing twice.
            assert post(service, "/add", {"passages": NEW})[1]["added"] == 0
            # The same texts with other fields are not the same passages.
            status, answer = post(service, "/add", {"passages": [row | {"meta": {"n": 1}} for row in NEW]})
            assert status == 409 and "found 'new0'" in answer["error"], answer
            status, deleted = post(service, "/delete", {"ids": ["d0", "new1", "unknown"]})
            if factory.startswith("HNSW"):
                assert status == 409 and "IndexHNSWFlat cannot delete" in deleted["error"], deleted
                left = {f"d{n}" for n in range(20)} | {"new0", "new1", "new2"}
            else:
                assert status == 200 and (deleted["deleted"], deleted["passages"]) == (2, 21)
                left = {f"d{n}" for n in range(1, 20)} | {"new0", "new2"}
        finally:
            done.set()
            for thread in asking:
                thread.join()
    states = [{f"d{n}" for n in range(20)}, {f"d{n}" for n in range(20)} | {"new0", "new1", "new2"}, left]
    texts = {f"d{n}": text for n, text in enumerate(MEANINGS.values())} | {row["_id"]: row["text"] for row in NEW}
    for status, answer in answers:
        results = answer["results"]
        assert status == 200 and {each["id"] for each in results} <= max(states, key=len)
        if factory != "IVF2,Flat":
            assert {each["id"] for each in results} in states
        assert all(each["text"] == texts[each["id"]] for each in results)
    assert len(answers) > 3
    # On disk is what `index add` writes: the vectors are those of `encode`.
    index = Index.open(place, verify="hash")
    assert {index.ids[row] for row in range(index.rows)} == left
    row = next(row for row in range(index.rows) if index.ids[row] == "new0")
    expected = embed_texts(towers, ["a new passage 0"], "document", EncodeOptions())[0]
    np.testing.assert_allclose(index.faiss.reconstruct(row) if factory == "Flat" else expected, expected, atol=1e-6)
    assert index.passage(row).fields == {"meta.n": 100}


def test_what_cannot_be_changed_is_refused_and_changes_nothing(towers: Towers, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "index"
    shutil.copytree(folder / "Flat", place)
    before = (place / "manifest.json").read_bytes()
    row = {"_id": "x", "text": "t"}
    with served(towers, place, "secret") as (service, _):
        authorized = {"authorization": "Bearer secret"}
        assert post(service, "/add", {"passages": [row]})[0] == 401
        # What a form of another site's page can send.
        assert post(service, "/add", {"passages": [row]}, **authorized, **{"content-type": "text/plain"})[0] == 415
        for path, body, status, message in (
            ("/add", {"passages": []}, 422, "list of 1 to 8 as 'passages', found a list of 0"),
            ("/add", {"passages": [row] * 9}, 422, "found a list of 9"),
            ("/add", {"passages": [row], "x": 1}, 422, "found 'passages', 'x'"),
            ("/add", {"passages": ["t"]}, 422, "passages[0]: expected an object, found str"),
            ("/add", {"passages": [row, {"_id": "y"}]}, 422, "passages[1]: expected a column 'text'"),
            ("/add", {"passages": [row, row]}, 422, "passages[1]: expected another id, found 'x' again"),
            ("/add", {"passages": [row | {"yaer": 1}]}, 422, "expected _id, title, text, meta.n, found 'yaer'"),
            ("/add", {"passages": [row | {"meta": {"n": "one"}}]}, 422, "field 'meta.n': expected values of one type"),
            ("/add", {"passages": [row | {"_id": "a b"}]}, 422, "expected an id without white space"),
            (
                "/add",
                {"passages": [row | {"_id": "d3"}]},
                409,
                "expected ids that are not yet in the index, found 'd3'",
            ),
            ("/delete", {"ids": [f"d{n}" for n in range(20)]}, 422, "list of 1 to 8"),
            ("/delete", {"ids": [None]}, 422, "ids: expected an id of text"),
        ):
            found, answer = post(service, path, body, **authorized)
            assert found == status and message in answer["error"], (body, answer)
            assert str(tmp_path) not in answer["error"] and tempfile.gettempdir() not in answer["error"]
        assert post(service, "/search", {"query": "q", "k": 100}, **authorized)[1]["results"][0]
    assert (place / "manifest.json").read_bytes() == before
    # Without the flag there are no such paths.
    with (
        Engine(towers, Index.open(place), EncodeOptions(), Batching()) as engine,
        running(make_app(engine, Limits(), lambda line: None)) as service,
    ):
        assert post(service, "/add", {"passages": [row]})[0] == 404


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--allow-changes: expected --token-file or --token, or --without-token"),
        (("--without-token", "--index", "other"), "--allow-changes: expected one --index, found 2"),
        (("--token", "t", "--mmap"), "--allow-changes: expected no --mmap"),
    ],
)
def test_flags_that_contradict_are_refused(world: Any, flags: tuple[str, ...], message: str) -> None:
    outcome = command("serve", "--model", world.model, "--index", world.index, "--allow-changes", *flags)
    assert outcome.code == 2 and message in outcome.err
