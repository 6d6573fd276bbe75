"""Readers of further.py's artifacts: codes, adapters, teachers, fields, image–text models, requests to the service."""

from __future__ import annotations

import asyncio
from functools import cache, partial
from pathlib import Path
from typing import Any

from children import Outcome, run_function
from readers import Reader, command, function

from eval.zero_shot.data import with_prompts
from eval.zero_shot.opening import open_set
from retriever.config.sources import SourceConfig
from retriever.data.sources import Notices, read_examples


def _scored(path: Path) -> None:
    for _ in read_examples(SourceConfig(str(path)), Notices()):
        pass


def _prompts(path: Path, world: Path) -> Outcome:
    return run_function(lambda: with_prompts(open_set(world / "classes"), path).prompts)


@cache
def _service(world: Path) -> tuple[Any, list[str]]:
    """The application of the service with the index of fields, and its log."""
    from index.ann.index import Index
    from retriever.encoding.encoder import EncodeOptions
    from retriever.models.modality import load_towers
    from retriever.serve.app import make_app
    from retriever.serve.batching import Batching, Engine
    from retriever.serve.requests import Limits

    log: list[str] = []
    towers, index = load_towers(str(world / "run/model")), Index.open(world / "fields_index")
    engine = Engine(towers, index, EncodeOptions(), Batching(timeout_s=0)).__enter__()
    return make_app(engine, Limits(), log.append), log


def _asked(route: str, path: Path, world: Path) -> Outcome:
    """Post the file to a route of the service, which must not answer with status 500."""
    app, log = _service(world)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": path.read_bytes(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": route,
        "raw_path": route.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "scheme": "http",
    }
    log.clear()
    asyncio.run(app(scope, receive, send))
    status, body = sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
    if status >= 500:
        return Outcome("traceback", f"status {status}: {body!r:.500}: {log}")
    return Outcome("ok" if status == 200 else "refused", body.decode()[:200])


def _reader_of_requests(route: str, artifact: str) -> Reader:
    return Reader(artifact, partial(_asked, route), needs=("fields_index", "fields.jsonl", artifact))


_FLAT = ("index", "build", "--embeddings", "PATH", "--out", "OUT", "--factory", "Flat")
_QUERY = ("search", "--model", "@run/model", "--index", "PATH", "--filter", "year>1995", "q")
FURTHER_READERS: dict[str, Reader] = {
    "int8 store": Reader("store_int8", command(*_FLAT), sealed=True, needs=("store_int8",)),
    "binary store": Reader("store_binary", command(*_FLAT), sealed=True, needs=("store_binary",)),
    "resealed int8 store": Reader("store_int8", command(*_FLAT), reseal=True, needs=("store_int8",)),
    "resealed binary store": Reader("store_binary", command(*_FLAT), reseal=True, needs=("store_binary",)),
    "teacher's scores": Reader("scored.jsonl", function(_scored), needs=("scored.jsonl",)),
    "teacher": Reader(
        "teacher.yaml", command("train", "PATH", "--dry-run"), needs=("scored.jsonl", "teacher.yaml"), weight=0.5
    ),
    "guide": Reader("guide.yaml", command("train", "PATH", "--dry-run"), needs=("guide.yaml",), weight=0.5),
    "adapter": Reader(
        "adapter/model",
        command("encode", "--model", "PATH", "--data", "@beir/corpus.jsonl", "--out", "OUT"),
        needs=("adapter",),
        weight=0.5,
    ),
    "cross-encoder": Reader(
        "cross_encoder",
        command("score", "--model", "PATH", "--data", "@mined.jsonl", "--out", "OUT.jsonl"),
        needs=("cross_encoder",),
        weight=0.5,
    ),
    "image–text model": Reader(
        "clip",
        command("encode", "--model", "PATH", "--data", "@images.jsonl", "--out", "OUT"),
        needs=("clip",),
        weight=0.5,
    ),
    "fields": Reader(
        "fields.jsonl",
        command("encode", "--model", "@run/model", "--data", "PATH", "--out", "OUT", "--fields", "year", "meta.kind"),
        needs=("fields.jsonl",),
        weight=0.5,
    ),
    "index of fields": Reader(
        "fields_index", command("index", "verify", "PATH"), sealed=True, needs=("fields.jsonl", "fields_index")
    ),
    "resealed index of fields": Reader(
        "fields_index", command(*_QUERY), reseal=True, needs=("fields.jsonl", "fields_index")
    ),
    "prompts": Reader("prompts.json", _prompts, needs=("prompts.json",)),
    "request to /search": _reader_of_requests("/search", "search.json"),
    "request to /v1/embeddings": _reader_of_requests("/v1/embeddings", "embeddings.json"),
    "request to /embed": _reader_of_requests("/embed", "embed.json"),
}
