"""What a locked image encoder makes of every picture of a source: computed once, read from a memory-mapped file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from index.files import atomic_path, read_json, write_json
from retriever.data.images.sources import BrokenPairError, PairSource
from retriever.models.images.transforms import ImageTransform
from retriever.models.mixed_precision import arithmetic
from retriever.utils.device import Precision, to_device
from retriever.utils.workers import init_worker, start_workers

if TYPE_CHECKING:
    from retriever.models.images.towers import ImageTextTowers

# Rows between two notes of how far a computation has come; at most so many are computed again.
_NOTED = 16384


class FeatureStore:
    """Features [rows, width], float16 on disk, of one source by one encoder; picklable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: np.ndarray = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def width(self) -> int:
        """Length of each."""
        return int(self._rows.shape[1])

    def read(self, row: int, place: str) -> Tensor:
        """float16 [width].

        Raises:
            BrokenPairError: the picture could not be read.
        """
        found = np.array(self._rows[row])
        if np.isnan(found[0]):
            raise BrokenPairError(f"{place}: picture that could not be read when features were computed")
        return torch.from_numpy(found)

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path]]:
        return FeatureStore, (self.path,)


@dataclass(frozen=True)
class PlannedFeatures:
    """In place of a FeatureStore while a run is only planned, not made: zeros, for which no picture is encoded."""

    width: int

    def read(self, row: int, place: str) -> Tensor:
        """float16 [width]."""
        return torch.zeros(self.width, dtype=torch.float16)


class _Pictures(Dataset[Tensor]):
    """uint8 [n, 3, height, width] of each run of rows, with a last row of flags: whether a picture could be read."""

    def __init__(self, source: PairSource, transform: ImageTransform, first: int, at_once: int) -> None:
        self.source, self.transform, self.first, self.at_once = source, transform, first, at_once

    def __len__(self) -> int:
        return -(-(len(self.source) - self.first) // self.at_once)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        start = self.first + number * self.at_once
        rows = range(start, min(start + self.at_once, len(self.source)))
        pixels = torch.zeros(len(rows), 3, *self.transform.size, dtype=torch.uint8)
        readable = torch.ones(len(rows), dtype=torch.bool)
        for place, row in enumerate(rows):
            try:
                pixels[place] = self.transform.pixels(self.source.read(row).open())
            except BrokenPairError:
                readable[place] = False
        return pixels, readable


def compute_features(
    towers: ImageTextTowers,
    source: PairSource,
    cache: Path,
    precision: Precision,
    *,
    at_once: int,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> FeatureStore:
    """The features of all pictures of a source, in the folder `cache`; computed unless they are there already.

    They are known by the encoder's weights, the transform, the precision and the source's pictures. A computation that
    was killed goes on where it had come to.

    Args:
        towers: on the device to use; its mode is left as it was found.
        at_once: pictures that pass through the encoder together.
        workers: processes that decode.
        progress: called with the number of pictures done since the last call, those of an earlier run included.
    """
    known = [towers.image_fingerprint(), precision, source.pictures_sha256()]
    key = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:24]
    path, about = cache / f"{key}.npy", cache / f"{key}.json"
    cache.mkdir(parents=True, exist_ok=True)
    if not about.exists():
        # Memory-mapped and filled in place; the note beside it says how far, so that no torn row is taken for whole.
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            header = np.lib.format.header_data_from_array_1_0(np.empty((0, towers.image_width), np.float16))
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (len(source), towers.image_width)})
            file.truncate(file.tell() + len(source) * towers.image_width * 2)
        write_json(about, {"rows": 0})
    done = int(read_json(about)["rows"])
    if progress is not None and done:
        progress(done)
    if done == len(source):
        return FeatureStore(path)
    features = np.load(path, mmap_mode="r+")
    pictures = _Pictures(source, towers.transform, done, at_once)
    loader = DataLoader(
        pictures,
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=init_worker if workers else None,
    )
    training, noted = towers.training, done
    towers.eval()
    try:
        with arithmetic(towers, precision), torch.inference_mode():
            for pixels, readable in start_workers(loader):
                found = towers.image_features(to_device(pixels, towers.device)).half().cpu()
                found[~readable] = torch.nan
                features[done : done + len(found)] = found.numpy()
                done += len(found)
                if done - noted >= _NOTED or done == len(source):
                    features.flush()
                    write_json(about, {"rows": done})
                    noted = done
                if progress is not None:
                    progress(len(found))
    finally:
        towers.train(training)
    return FeatureStore(path)
