"""Embeddings over HTTP in the forms of OpenAI (/v1/embeddings) and of Text Embeddings Inference (/embed, /info)."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from retriever.models.loading.text_settings import Side
from retriever.models.towers import Towers
from retriever.serve.batching import Embeddings, Engine
from retriever.serve.errors import JSON, RequestError
from retriever.serve.requests import Limits, parse_object, read_body
from retriever.serve.waiting import engine_result
from retriever.utils.versions import __version__

SIDE_NAMES: dict[str, Side] = {"query": "query", "passage": "document", "document": "document"}
"""Names of the sides in requests; NVIDIA's and Cohere's services write passage and document."""
# Texts that are queued at once: between them, queries of others are answered.
CHUNK = 32
OPENAI_FIELDS = ("input", "model", "encoding_format", "dimensions", "user", "input_type")
TEI_FIELDS = ("inputs", "truncate", "truncation_direction", "normalize", "prompt_name", "dimensions")


def sides_differ(towers: Towers) -> bool:
    """Whether the model embeds queries and passages differently: by prompts, lengths or towers of their own."""
    query, document = towers.tokenizer("query"), towers.tokenizer("document")
    return (
        not towers.shared
        or towers.prompt("query") != towers.prompt("document")
        or (query.max_length, query.settings()) != (document.max_length, document.settings())
    )


class EmbeddingRoutes:
    """The handlers of /v1/embeddings, /v1/models, /embed and /info.

    Args:
        engine: embeds the texts.
        name: name of the model in requests and answers.
        limits: limits of a request.
    """

    def __init__(self, engine: Engine, name: str, limits: Limits) -> None:
        self._engine = engine
        self._name = name
        self._limits = limits
        self._towers = engine.towers
        self._differ = sides_differ(engine.towers)

    async def openai(self, request: Request) -> Response:
        """Handle POST /v1/embeddings: the embeddings of texts as numbers or in base64 (float32, little-endian)."""
        fields = parse_object(await read_body(request, self._limits))
        _check_fields(fields, OPENAI_FIELDS)
        texts = self._texts("input", fields.get("input"))
        encoding = fields.get("encoding_format") or "float"
        if encoding not in ("float", "base64"):
            raise RequestError(422, f"encoding_format: expected float or base64, found {encoding!r:.60}")
        model = fields.get("model")
        side = self._side_of_model(model, fields.get("input_type"))
        dimension = self._dimension(fields.get("dimensions"))
        found = await self._embed(texts, side)
        vectors = cut(found.vectors, dimension)
        data = [
            {"object": "embedding", "index": n, "embedding": _encoded(vector, encoding)}
            for n, vector in enumerate(vectors)
        ]
        tokens = int(found.tokens.sum())
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSON({"object": "list", "data": data, "model": model, "usage": usage})

    async def models(self, request: Request) -> Response:
        """Handle GET /v1/models: the names that /v1/embeddings accepts."""
        names = [*([] if self._differ else [self._name]), f"{self._name}:query", f"{self._name}:passage"]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "retriever"} for name in names]
        return JSON({"object": "list", "data": data})

    async def tei(self, request: Request) -> Response:
        """Handle POST /embed and POST /: a list of embeddings, one for each text."""
        fields = parse_object(await read_body(request, self._limits))
        _check_fields(fields, TEI_FIELDS)
        texts = self._texts("inputs", fields.get("inputs"))
        side = self._side("prompt_name", fields.get("prompt_name"))
        dimension = self._dimension(fields.get("dimensions"))
        normalize, truncate = fields.get("normalize"), fields.get("truncate")
        for name, value in (("normalize", normalize), ("truncate", truncate)):
            if value is not None and not isinstance(value, bool):
                raise RequestError(422, f"{name}: expected true or false, found {value!r:.60}", name)
        direction = self._towers.tokenizer(side).tokenizer.truncation_side
        if (asked := fields.get("truncation_direction")) is not None and str(asked).lower() != direction:
            raise RequestError(422, f"truncation_direction: expected {direction}, found {asked!r:.60}")
        found = await self._embed(texts, side, untruncated=truncate is False)
        limit = self._towers.tokenizer(side).max_length
        if truncate is False and limit is not None and (longer := np.flatnonzero(found.tokens > limit)).size:
            number = int(longer[0])
            found_tokens = f"found {found.tokens[number]}; or truncate: true"
            raise RequestError(413, f"inputs[{number}]: expected at most {limit} tokens, {found_tokens}", "inputs")
        vectors = found.vectors
        unit = bool(np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3))
        if normalize is False and unit:
            raise RequestError(422, "normalize: expected true, because the model's embeddings have unit length")
        vectors = cut(vectors, dimension)
        if normalize is not False and not unit:
            vectors = _unit(vectors)
        return JSON(vectors.tolist())

    async def info(self, request: Request) -> Response:
        """Handle GET /info: the model and the limits, with the names of Text Embeddings Inference."""
        towers, limits = self._towers, self._limits
        return JSON(
            {
                "model_id": self._name,
                "model_sha": towers.fingerprint()["sha256"],
                "model_dtype": str(next(towers.parameters()).dtype).removeprefix("torch."),
                "model_type": {"embedding": {"dimension": towers.dimension}},
                "max_input_length": towers.tokenizer("document").max_length,
                "max_client_batch_size": limits.inputs,
                "max_concurrent_requests": self._engine.max_waiting,
                "max_batch_requests": self._engine.max_queries,
                "auto_truncate": True,
                "prompts": {"query": towers.prompt("query"), "document": towers.prompt("document")},
                "version": __version__,
            }
        )

    async def _embed(self, texts: Sequence[str], side: Side, *, untruncated: bool = False) -> Embeddings:
        parts, step = [], min(CHUNK, self._engine.max_waiting)
        for start in range(0, len(texts), step):
            chunk = texts[start : start + step]
            parts.append(await engine_result(self._engine.embed, chunk, side, untruncated=untruncated))
        return Embeddings(
            np.concatenate([part.vectors for part in parts]), np.concatenate([part.tokens for part in parts])
        )

    def _texts(self, name: str, value: object) -> list[str]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts:
            raise RequestError(422, f"{name}: expected a text or a list of texts, found {value!r:.60}", name)
        if len(texts) > self._limits.inputs:
            raise RequestError(422, f"{name}: expected at most {self._limits.inputs} texts, found {len(texts)}", name)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                found = f"found {type(text).__name__}"
                raise RequestError(422, f"{name}[{number}]: expected text (token ids are not read), {found}", name)
            if len(text) > self._limits.input:
                expected = f"expected at most {self._limits.input} characters"
                raise RequestError(413, f"{name}[{number}]: {expected}, found {len(text)}", name)
        return texts

    def _side_of_model(self, model: object, input_type: object) -> Side:
        name, _, suffix = str(model).rpartition(":")
        if name != self._name or suffix not in SIDE_NAMES:
            name, suffix = str(model), ""
        if not isinstance(model, str) or name != self._name:
            raise RequestError(404, f"model: expected {self._name!r}, found {model!r:.80}", "model")
        return self._side("input_type", input_type if input_type is not None else suffix or None)

    def _side(self, name: str, value: object) -> Side:
        if value is None:
            if self._differ:
                how = " or the model's name with :query or :passage" if name == "input_type" else ""
                what = "for the model embeds the two differently"
                raise RequestError(422, f"{name}: expected 'query' or 'passage'{how}, {what}", name)
            return "document"
        if not isinstance(value, str) or value not in SIDE_NAMES:
            raise RequestError(422, f"{name}: expected {', '.join(SIDE_NAMES)}, found {value!r:.60}", name)
        return SIDE_NAMES[value]

    def _dimension(self, value: object) -> int:
        full = self._towers.dimension
        if value is None:
            return full
        if type(value) is not int or not 1 <= value <= full:
            raise RequestError(
                422, f"dimensions: expected a number from 1 to {full}, found {value!r:.60}", "dimensions"
            )
        return value


def cut(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """The first `dimension` values of embeddings [n, D], at unit length if they were cut (Matryoshka, 2205.13147)."""
    return vectors if dimension == vectors.shape[1] else _unit(vectors[:, :dimension])


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def _encoded(vector: np.ndarray, encoding: str) -> Any:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()


def _check_fields(fields: dict[str, Any], known: Sequence[str]) -> None:
    for name in fields:
        if name not in known:
            raise RequestError(422, f"expected {', '.join(known)}, found {name!r:.60}", name)
