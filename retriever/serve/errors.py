"""Errors as responses, in the form that the clients of a path expect."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

TEI_PATHS = ("/", "/embed", "/info")
"""Paths of Text Embeddings Inference; it answers errors with an error type."""


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: the HTTP status.
        message: the reason, on one line.
        param: the field of the request that is wrong, for clients that show it.
    """

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param


class JSON(Response):
    """A response of JSON on one line."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return (json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n").encode()


def error_response(
    path: str, status: int, message: str, headers: Mapping[str, str] | None = None, param: str | None = None
) -> JSON:
    """A one-line error: OpenAI's form below /v1/, Text Embeddings Inference's on its paths, {"error": message} else."""
    content: dict[str, Any] = {"error": message}
    if path.startswith("/v1/"):
        content = {"error": {"message": message, "type": _openai_type(status), "param": param, "code": None}}
    elif path in TEI_PATHS:
        content["error_type"] = _tei_type(status)
    return JSON(content, status, headers)


def _openai_type(status: int) -> str:
    known = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    return known.get(status, "invalid_request_error" if status < 500 else "server_error")


def _tei_type(status: int) -> str:
    return {429: "overloaded", 503: "unhealthy"}.get(status, "validation" if status < 500 else "backend")
