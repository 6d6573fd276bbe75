"""Thumbnails of the images of an index, for the search page."""

from __future__ import annotations

import io
import tempfile
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from index.ann.index import Index
from index.files import InputError
from retriever.encoding.image_items import ImageColumns, open_image_items
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

    A request contains an id of the index. For image files it is the quoted path relative to a folder. No other part of
    a request is used as a path, and paths that lead out of the folder are refused.

    Args:
        data: what `retriever encode` read: a folder of images, tars, or a table with images or their paths. Also the
            folder of a table of paths. Tars and tables are indexed again, once.
        index: the index of these images.

    Raises:
        InputError: the data cannot be read, or they lack the first image of the index.
    """

    def __init__(self, data: str | Path, index: Index | MultiIndex) -> None:
        first, folder = index.ids[0], Path(data)
        in_folder = folder.is_dir() and _file_in(folder, first) is not None
        self._read: Callable[[str], Path | bytes | None] = partial(_file_in, folder) if in_folder else _Stored(data)
        if self._read(first) is None:
            raise InputError(f"{data}: expected the images that were indexed, found no {unquote(first)!r:.60} in it")
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

        try:
            source = self._read(self._index.ids[row])
            if source is None:
                return None
            image = open_image(source)
        except InputError:
            return None
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
        return buffer.getvalue()


class _Stored:
    """Reads the images of tars and tables by the ids that `retriever encode` gives them."""

    def __init__(self, data: str | Path) -> None:
        # For the index of the tars. It is removed with this object.
        self._cache = tempfile.TemporaryDirectory(prefix="retriever-images-")
        cache = Path(self._cache.name)
        self._items = open_image_items(str(data), ImageColumns(), cache, workers=0, progress=lambda done: None)
        self._rows = {self._items.passage(row).id: row for row in range(len(self._items))}
        self._folder = Path(data) if Path(data).is_dir() else Path(data).parent
        # Several requests must not use the open tars at the same time.
        self._lock = threading.Lock()

    def __call__(self, id_: str) -> Path | bytes | None:
        if id_ not in self._rows:
            return None
        with self._lock:
            image = self._items.read(self._rows[id_])
        return _inside(self._folder, image) if isinstance(image, Path) else image


def _file_in(folder: Path, id_: str) -> Path | None:
    return _inside(folder, folder / unquote(id_))


def _inside(folder: Path, path: Path) -> Path | None:
    """The path if it is that of a file in the folder."""
    # Symbolic links are resolved, so that neither a link nor ".." leads out of the folder.
    try:
        file = path.resolve()
        return file if file.is_relative_to(folder.resolve()) and file.is_file() else None
    except (OSError, ValueError):
        return None
