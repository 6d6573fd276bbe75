"""Waiting for the engine in a request; its refusals become HTTP statuses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

from index.fields.filters import FilterError
from retriever.serve.batching import Busy, Closed
from retriever.serve.errors import RequestError

P = ParamSpec("P")
T = TypeVar("T")


async def engine_result(submit: Callable[P, Future[T]], *arguments: P.args, **named: P.kwargs) -> T:
    """Submit a job to the engine and wait for its outcome.

    Raises:
        RequestError: too many queries are waiting (429), the filter does not fit the index (422), or the engine is
            closed (503).
    """
    try:
        return await asyncio.wrap_future(submit(*arguments, **named))
    except Busy:
        raise RequestError(429, "too many queries are waiting; try again in a second") from None
    except FilterError as error:
        raise RequestError(422, str(error), "filter") from None
    except Closed:
        raise RequestError(503, "the service is shutting down") from None
