"""Thumbnails of the images of an index, for the search page."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from index.ann.index import Index
from index.files import InputError
from retriever.searching.search import Result
from retriever.serve.errors import RequestError

if TYPE_CHECKING:
    from index.ann.multi_index import MultiIndex

# Maximum width and height in pixels.
SIDE = 256
# Thumbnails cached in memory.
CACHED = 512


class Thumbnails:
    """Serves thumbnails of indexed images.

    A request contains an id of the index, which is the quoted path of the image relative to `folder` (of a table: to
    the table's folder). No other part of a request is used as a path, and paths that lead out of the folder are
    refused.

    Args:
        folder: the folder from which `retriever encode` read the images.
        index: the index of these images.

    Raises:
        InputError: the folder does not exist, or it lacks the first image of the index.
    """

    def __init__(self, folder: Path, index: Index | MultiIndex) -> None:
        self._folder = folder.resolve()
        self._index = index
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        if self._file(0) is None:
            first = unquote(index.ids[0])
            raise InputError(f"{folder}: expected the folder of the image files indexed, found no {first!r:.60} in it")
        self.replace(index)

    def replace(self, index: Index | MultiIndex) -> None:
        """Show the images of a changed index from now on."""
        rows = {id_: row for row, id_ in enumerate(index.ids)}
        self._index, self._rows = index, rows
        self._thumbnail = lru_cache(CACHED)(self._thumbnail_of)

    def url(self, result: Result) -> str:
        """The URL of a result's image on this server."""
        return f"/image?{urlencode({'id': result.id})}"

    async def show(self, request: Request) -> Response:
        """Handle GET /image?id=…: a JPEG of at most SIDE × SIDE pixels; status 404 if the index has no such image."""
        row = self._rows.get(request.query_params.get("id", ""))
        content = None if row is None else await run_in_threadpool(self._thumbnail, row)
        if content is None:
            raise RequestError(404, "expected the id of an image of the index")
        return Response(content, media_type="image/jpeg")

    def _thumbnail_of(self, row: int) -> bytes | None:
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
        # Symbolic links are resolved, so that neither a link nor ".." leads out of the folder.
        try:
            file = (self._folder / unquote(self._index.ids[row])).resolve()
        except (OSError, ValueError):
            return None
        return file if file.is_relative_to(self._folder) and file.is_file() else None
