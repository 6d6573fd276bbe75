"""Thumbnails of the pictures of an index: of its own ids alone, from files in one folder alone."""

from __future__ import annotations

import io
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from index.ann.index import Index
from index.files import InputError
from retriever.searching.search import Result
from retriever.serve.requests import Refused

if TYPE_CHECKING:
    from index.ann.multi_index import MultiIndex

SIDE = 256
KEPT = 512


class Pictures:
    """Where the page's pictures come from.

    An id of the index stands for a passage, whose text is a path from `folder`; nothing else of a request reaches the
    disk, and a path that leads out of the folder is not followed.

    Args:
        folder: what `retriever encode` read the pictures from.
        index: the index that was built of them.

    Raises:
        InputError: there is no such folder, or it lacks the index's first picture.
    """

    def __init__(self, folder: Path, index: Index | MultiIndex) -> None:
        self._folder = folder.resolve()
        self._index = index
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        first = index.passage(0).text
        if self._file(0) is None:
            raise InputError(f"{folder}: expected the folder whose pictures were indexed, found no {first!r:.60} in it")
        self._thumbnail = lru_cache(KEPT)(self._made)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {id_: row for row, id_ in enumerate(self._index.ids)}

    def address(self, result: Result) -> str:
        """The address of a result's picture on this server."""
        return f"/picture?{urlencode({'id': result.id})}"

    async def show(self, request: Request) -> Response:
        """GET /picture?id=…: a JPEG of at most SIDE pixels a side; 404 for what is no picture of the index."""
        row = self._rows.get(request.query_params.get("id", ""))
        content = None if row is None else await run_in_threadpool(self._thumbnail, row)
        if content is None:
            raise Refused(404, "expected the id of a picture of the index")
        return Response(content, media_type="image/jpeg")

    def _made(self, row: int) -> bytes | None:
        from retriever.models.images.transforms import open_image

        file = self._file(row)
        if file is None:
            return None
        try:
            image = open_image(file)
        except InputError:
            return None
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
        return buffer.getvalue()

    def _file(self, row: int) -> Path | None:
        # Links resolved: one that leads out of the folder is as little followed as "..".
        try:
            file = (self._folder / self._index.passage(row).text).resolve()
        except (OSError, ValueError):
            return None
        return file if file.is_relative_to(self._folder) and file.is_file() else None
