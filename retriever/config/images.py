"""What a run says of its pictures: the image tower, and where pairs of picture and caption come from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

# Patch size, default side of a picture, width, layers, heads (Dosovitskiy et al., arXiv 2010.11929, table 1; S from
# Touvron et al., arXiv 2012.12877). "tiny" is for machines without a GPU: 64 patches, 0.8 million parameters.
ARCHITECTURES = {
    "tiny": (8, 64, 128, 4, 4),
    "ViT-S/16": (16, 224, 384, 12, 6),
    "ViT-B/32": (32, 224, 768, 12, 12),
    "ViT-B/16": (16, 224, 768, 12, 12),
    "ViT-L/16": (16, 224, 1024, 24, 16),
    "ViT-L/14": (14, 224, 1024, 24, 16),
}


@dataclass(frozen=True)
class ImageConfig:
    """The image tower of a run on pictures and captions; the rest of `model` is then its text tower."""

    name: str = ""
    """A vision encoder (ViT, CLIP, SigLIP, DINOv2), a local path or hub name; or from scratch: tiny, ViT-S/16,
    ViT-B/32, ViT-B/16, ViT-L/16, ViT-L/14. A whole CLIP or SigLIP folder gives both towers where model.name and
    model.architecture are empty, and its image tower otherwise. Empty: no pictures, a run on texts."""
    size: int | None = None
    """Side of the square of pixels of a model from scratch; empty: 64 for tiny, else 224."""
    statistics: Literal["processor", "clip", "imagenet"] = "processor"
    """Mean and deviation that pixels are normalised by; processor: the folder's own (CLIP's for a new model)."""
    lock: Literal["none", "image", "text"] = "none"
    """A tower that does not train, its projection apart. image: as in LiT (arXiv 2111.07991), with the features of
    every picture computed once, without random crops, and kept in the cache."""
    patch_dropout: float = 0.0
    """Share of a picture's patches left out in training (arXiv 2212.00794)."""
    augment: bool = True
    """Train on random crops (RandomResizedCrop); off: on the crop at the centre that evaluation uses."""
    flip: bool = False
    """Mirror half of the pictures in training."""

    @property
    def is_new(self) -> bool:
        """Whether the tower begins with random weights."""
        return self.name in ARCHITECTURES

    def __post_init__(self) -> None:
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"model.image.patch_dropout: expected 0 to below 1, found {self.patch_dropout}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"model.image.size: expected at least 1, found {self.size}")
        if self.lock == "image" and self.patch_dropout:
            raise ValueError("model.image.patch_dropout: expected 0 with a locked image tower, which sees all patches")


@dataclass(frozen=True)
class ImageSource:
    """One source of pictures with captions."""

    path: str
    """webdataset tars (brace ranges: cc3m-{00000..00331}.tar; or a folder of them), a .jsonl, .csv, .tsv or .parquet
    file with paths of pictures, a Hugging Face dataset folder, or, with the format huggingface, a hub name."""
    format: Literal["auto", "webdataset", "files", "huggingface"] = "auto"
    """How to read the path; auto goes by what is found there."""
    image: str = "image"
    """Column with the picture, or with its path, relative to the file's folder."""
    caption: tuple[str, ...] = ()
    """Where captions stand: in tars txt or json:KEY, in a Hugging Face dataset columns, in a file one column. Several,
    or a list in one of them: one is drawn each time the pair comes. Empty: txt in tars, caption in a json or column."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    weight: float | None = None
    """Share of the batches that come from this source, relative to the other sources' (none: its number of pairs, at
    least that of a batch)."""
    max_broken: float = 0.01
    """Stop once more than this share of the pairs indexed or read, and more than 100, had a broken picture or no
    caption; until then such pairs are left out, counted and logged."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data.images: path: expected tars, a file, a folder or a hub name, found nothing")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"data.images: weight: expected a positive number, found {self.weight}")
        if not 0 <= self.max_broken <= 1:
            raise ValueError(f"data.images: max_broken: expected a share from 0 to 1, found {self.max_broken}")
