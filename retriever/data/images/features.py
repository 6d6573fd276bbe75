"""Features of images by a locked image encoder, computed once and stored in a memory-mapped file."""

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
from index.store.arrays import open_array
from retriever.data.images.pairs import BrokenPairError, PairSource
from retriever.models.images.transforms import ImageTransform
from retriever.models.mixed_precision import mixed_precision
from retriever.utils.device import Precision, to_device
from retriever.utils.workers import init_worker, start_workers

if TYPE_CHECKING:
    from retriever.models.images.towers import ImageTextTowers

# Rows after which the progress is stored; at most this many are computed again after an interruption.
_CHECKPOINT_ROWS = 16384


class FeatureStore:
    """Features [rows, width] of the images of one source, float16, memory-mapped. Picklable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: np.ndarray = open_array(path)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def width(self) -> int:
        """Dimension of the features."""
        return int(self._rows.shape[1])

    def read(self, row: int, location: str) -> Tensor:
        """Return the features of a row, float16 [width].

        Raises:
            BrokenPairError: If the image could not be read when the features were computed. The message starts with
                `location`.
        """
        features = np.array(self._rows[row])
        if np.isnan(features[0]):
            raise BrokenPairError(f"{location}: the image could not be read when features were computed")
        return torch.from_numpy(features)

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path]]:
        return FeatureStore, (self.path,)


@dataclass(frozen=True)
class PlaceholderFeatures:
    """Zeros in place of a FeatureStore, for a dry run, in which no image is encoded."""

    width: int

    def read(self, row: int, location: str) -> Tensor:
        """Return zeros, float16 [width]."""
        return torch.zeros(self.width, dtype=torch.float16)


class _PixelBatches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of consecutive images: pixels, uint8 [n, 3, height, width], and whether each was readable, bool [n]."""

    def __init__(self, source: PairSource, transform: ImageTransform, start: int, batch_size: int) -> None:
        self.source, self.transform, self.start, self.batch_size = source, transform, start, batch_size

    def __len__(self) -> int:
        return -(-(len(self.source) - self.start) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        start = self.start + number * self.batch_size
        rows = range(start, min(start + self.batch_size, len(self.source)))
        pixels = torch.zeros(len(rows), 3, *self.transform.size, dtype=torch.uint8)
        readable = torch.ones(len(rows), dtype=torch.bool)
        for position, row in enumerate(rows):
            try:
                pixels[position] = self.transform.pixels(self.source.read(row).open())
            except BrokenPairError:
                readable[position] = False
        return pixels, readable


def compute_features(
    towers: ImageTextTowers,
    source: PairSource,
    cache: Path,
    precision: Precision,
    *,
    batch_size: int,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> FeatureStore:
    """Compute the features of all images of a source, unless they are in the folder `cache`.

    They are identified by the encoder's weights, the transform, the precision and the images. An interrupted
    computation is resumed.

    Args:
        towers: Towers on the device to use. Their training mode is restored afterwards.
        source: The images.
        cache: Folder for the features.
        precision: Precision of the encoder.
        batch_size: Number of images that pass through the encoder together.
        workers: Number of processes that decode images. Default: 0, the calling process.
        progress: Called with the number of images done since the last call, including those of an earlier run.
    """
    identity = [towers.image_fingerprint(), precision, source.images_sha256()]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:24]
    path, state = cache / f"{key}.npy", cache / f"{key}.json"
    cache.mkdir(parents=True, exist_ok=True)
    if not state.exists():
        # The file is filled in place. The JSON file states how many rows are complete.
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            header = np.lib.format.header_data_from_array_1_0(np.empty((0, towers.image_feature_dim), np.float16))
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (len(source), towers.image_feature_dim)})
            file.truncate(file.tell() + len(source) * towers.image_feature_dim * 2)
        write_json(state, {"rows": 0})
    done = int(read_json(state)["rows"])
    if progress is not None and done:
        progress(done)
    if done == len(source):
        return FeatureStore(path)
    features = np.load(path, mmap_mode="r+")
    loader = DataLoader(
        _PixelBatches(source, towers.transform, done, batch_size),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=init_worker if workers else None,
    )
    training, saved = towers.training, done
    towers.eval()
    try:
        with mixed_precision(towers, precision), torch.inference_mode():
            for pixels, readable in start_workers(loader):
                batch = towers.image_features(to_device(pixels, towers.device)).half().cpu()
                batch[~readable] = torch.nan
                features[done : done + len(batch)] = batch.numpy()
                done += len(batch)
                if done - saved >= _CHECKPOINT_ROWS or done == len(source):
                    features.flush()
                    write_json(state, {"rows": done})
                    saved = done
                if progress is not None:
                    progress(len(batch))
    finally:
        towers.train(training)
    return FeatureStore(path)
