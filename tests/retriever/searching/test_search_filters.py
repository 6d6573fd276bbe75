"""Fields reach results from the corpus, and filters select them, in Python, on the command line and over HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import MEANINGS, command, write_lines

import retriever
from index.ann.index import Index

YEARS = {word: 1990 + n for n, word in enumerate(MEANINGS)}


@pytest.fixture(scope="module")
def index(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fields")
    rows: list[object] = [
        {"_id": word, "text": text, "year": YEARS[word], "meta": {"kind": ["noun", word[0]]}}
        for word, text in MEANINGS.items()
    ]
    corpus = write_lines(folder / "corpus.jsonl", rows)
    flags = ("--model", world.model, "--data", corpus, "--out", folder / "embeddings", "--fields")
    assert command("encode", *flags, "year", "meta.kind").code == 0
    # Other fields are another store.
    outcome = command("encode", *flags, "year")
    assert outcome.code == 1 and "was begun with another source ('fields':" in outcome.err.replace("{", "")
    outcome = command("encode", *flags[:4], "--out", folder / "other", "--fields", "yaer")
    assert outcome.code == 1 and "expected the field 'yaer'" in outcome.err
    assert command("index", "build", "--embeddings", folder / "embeddings", "--out", folder / "index").code == 0
    return folder / "index"


def test_python_and_the_command_filter_alike(world: Any, index: Path) -> None:
    answer = retriever.search(world.model, index, "what is a tree?", k=20, filter={"year": {"$lt": 1995}})[0]
    assert {result.id for result in answer.results} == {word for word, year in YEARS.items() if year < 1995}
    assert all(
        result.fields == {"year": YEARS[result.id], "meta.kind": ["noun", result.id[0]]} for result in answer.results
    )
    flags = ("search", "--model", world.model, "--index", index, "--json", "--k", 20, "--filter")
    outcome = command(*flags, "year<1995", "what is a tree?")
    assert [r["id"] for r in json.loads(outcome.out)["results"]] == [result.id for result in answer.results]
    outcome = command(*flags, '{"meta.kind": "s"}', "what is a tree?")
    assert {r["id"] for r in json.loads(outcome.out)["results"]} == {word for word in MEANINGS if word[0] == "s"}
    outcome = command(*flags, "year", "x")
    assert outcome.code == 2 and "--filter: expected a condition such as year>=2000 or lang=en" in outcome.err
    with pytest.raises(retriever.ConfigError, match="filter: year: expected text, a number"):
        retriever.search(world.model, index, "x", filter={"year": None})


def test_the_service_filters_each_request_on_its_own(world: Any, index: Path) -> None:
    pytest.importorskip("starlette")
    from retriever.encoding.encoder import EncodeOptions
    from retriever.models.modality import load_towers
    from retriever.serve.batching import Batching, Engine
    from retriever.serve.errors import RequestError
    from retriever.serve.requests import Limits, parse_json_body, parse_parameters
    from retriever.serve.waiting import engine_result

    async def ask(engine: Engine, *filters: object) -> list[Any]:
        bodies = [json.dumps({"query": "x", "k": 20, "filter": filter}).encode() for filter in filters]
        wanted = [parse_json_body(body, Limits(), 10) for body in bodies]
        waiting = [engine_result(engine.submit, each.queries, each.k, each.filter) for each in wanted]
        return await asyncio.gather(*waiting, return_exceptions=True)

    options = Batching(timeout_s=0.5)
    with Engine(load_towers(str(world.model)), Index.open(index), EncodeOptions(), options) as engine:
        early, wrong, late, all_ = asyncio.run(ask(engine, "year<1995", {"yaer": 1}, {"year": {"$gte": 1995}}, None))
    assert isinstance(wrong, RequestError) and wrong.status == 422 and "found 'yaer'" in str(wrong)
    ids = [{result.id for result in each[0].results} for each in (early, late, all_)]
    assert ids[0] | ids[1] == ids[2] == set(MEANINGS) and not ids[0] & ids[1]
    assert parse_parameters([("query", "x"), ("filter", "a>1")], Limits(), 10).filter is not None
    with pytest.raises(RequestError, match="filter: expected an object"):
        parse_json_body(b'{"query": "x", "filter": {}}', Limits(), 10)
