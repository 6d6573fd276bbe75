"""Configuration of the image tower and of the sources of image–caption pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from retriever.config.loss_options import SourceLossConfig

# Patch size, default image size, width, layers, heads (Dosovitskiy et al., arXiv 2010.11929, table 1; S from Touvron
# et al., arXiv 2012.12877). "tiny" is for machines without a GPU: 64 patches, 0.8 million parameters.
TRANSFORMERS = {
    "tiny": (8, 64, 128, 4, 4),
    "ViT-S/16": (16, 224, 384, 12, 6),
    "ViT-B/32": (32, 224, 768, 12, 12),
    "ViT-B/16": (16, 224, 768, 12, 12),
    "ViT-L/16": (16, 224, 1024, 24, 16),
    "ViT-L/14": (14, 224, 1024, 24, 16),
}
# Default image size, and the widths of the four stages of one block each. A residual network with group normalization
# (BiT, arXiv 1912.11370): unlike with batch normalization, an embedding does not depend on the rest of the batch.
# On few images it learns faster than a transformer. 0.5 million parameters.
RESIDUAL_NETWORKS = {"tiny-resnet": (64, (64, 128, 256, 512))}
ARCHITECTURES = (*TRANSFORMERS, *RESIDUAL_NETWORKS)

# Height and width of the largest input of a tower, in pixels.
MAX_SIZE = 8192


@dataclass(frozen=True)
class ImageConfig:
    """The image tower of a run on images and captions. The other fields of `model` then describe its text tower."""

    name: str = ""
    """A vision encoder (ViT, CLIP, SigLIP, DINOv2) as a local path or a hub name, or an architecture to train from
    scratch: tiny, tiny-resnet, ViT-S/16, ViT-B/32, ViT-B/16, ViT-L/16 or ViT-L/14. A full CLIP or SigLIP model provides
    both towers if model.name and model.architecture are empty, otherwise only its image tower. Empty: train on texts
    only."""
    size: int | None = None
    """Height and width of the input images of a model from scratch, in pixels. None: 64 for tiny and tiny-resnet,
    otherwise 224."""
    statistics: Literal["processor", "clip", "imagenet"] = "processor"
    """Mean and standard deviation for the normalization of pixels. processor: those of the model, or CLIP's for a model
    from scratch."""
    lock: Literal["none", "image", "text"] = "none"
    """Tower whose weights are frozen, except for its projection. image: as in LiT (arXiv 2111.07991); the features of
    every image are computed once, without random crops, and cached."""
    into_text_space: bool = False
    """Project the images to the dimension of the text tower, which gets no projection: with lock text, texts keep the
    embeddings of model.name."""
    patch_dropout: float = 0.0
    """Fraction of the patches of an image that are dropped in training, 0 to below 1 (FLIP, arXiv 2212.00794)."""
    augment: bool = True
    """Train on random crops (RandomResizedCrop). False: train on the center crop, as in evaluation."""
    flip: bool = False
    """Flip images horizontally with probability 0.5 in training."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random crop, as a fraction of the image. open_clip's default is 0.9 to 1."""
    crop_ratio: tuple[float, float] = (0.75, 1.33)
    """Smallest and largest ratio of width to height of a random crop."""
    jitter: float = 0.0
    """Strength of random changes of brightness, contrast and saturation in training, 0 to below 1: each is multiplied
    by a factor from 1 - jitter to 1 + jitter."""

    @property
    def is_new(self) -> bool:
        """Whether the tower is trained from scratch."""
        return self.name in ARCHITECTURES

    def __post_init__(self) -> None:
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"model.image.patch_dropout: expected 0 to below 1, found {self.patch_dropout}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"model.image.size: expected at least 1, found {self.size}")
        if self.size is not None and self.size > MAX_SIZE:
            raise ValueError(f"model.image.size: expected at most {MAX_SIZE} pixels, found {min(self.size, 10**18)}")
        for name, limit in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
            low, high = getattr(self, name)
            if not (0 < low <= high <= limit and math.isfinite(high)):
                wanted = "two ascending numbers above 0" + (" and at most 1" if limit == 1 else "")
                raise ValueError(f"model.image.{name}: expected {wanted}, found {low} and {high}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"model.image.jitter: expected 0 to below 1, found {self.jitter}")
        if self.jitter and (self.lock == "image" or not self.augment):
            raise ValueError("model.image.jitter: expected 0 without model.image.augment or with a locked image tower")
        if self.lock == "image" and self.patch_dropout:
            raise ValueError("model.image.patch_dropout: expected 0 with a locked image tower, which sees all patches")


@dataclass(frozen=True)
class ImageSource:
    """One source of images with captions."""

    path: str
    """webdataset tars (.tar or .tar.gz; a folder, braces such as cc3m-{00000..00331}.tar, or wildcards; also a URL), a
    .jsonl, .csv or .tsv file with image paths, .parquet files with paths or images, a folder with a folder of images
    for each class, a folder of a Hugging Face dataset, or, with format huggingface, a hub name. Files at a URL are
    downloaded once, by fsspec."""
    format: Literal["auto", "webdataset", "files", "classes", "huggingface"] = "auto"
    """Format of the path. auto: detected from the path and its content."""
    image: str = ""
    """Column with the image, or with its path relative to the folder of the file. Empty: the first of image, filepath,
    file_name, path and file."""
    caption: tuple[str, ...] = ()
    """Where the captions are: txt or json:KEY in tars, columns in a Hugging Face dataset or in Parquet files with
    images, one column in a file. Of several captions, one is drawn each time. Empty: txt in tars, otherwise the json
    key caption; the first of the columns caption, captions, text and title."""
    prompts: tuple[str, ...] = ()
    """Captions of class folders, with {c} for the name of the class; of several, one is drawn each time. Empty: the
    lines of zeroshot_classification_templates.txt in the folder, or "a photo of a {c}.". The name is that of the
    folder, unless classnames.txt renames it."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    weight: float | None = None
    """Share of the batches that come from this source, relative to the weights of the other sources, which must then
    have one, too. None for all sources: their numbers of pairs, at least batch_size."""
    max_broken: float = 0.01
    """Maximum fraction of pairs with an unreadable image or without a caption. Such pairs are skipped, counted and
    logged; the run stops if they are more than this fraction and more than 100."""
    loss: SourceLossConfig = field(default_factory=SourceLossConfig)

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("data.images: path: expected tars, a file, a folder or a hub name, found nothing")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"data.images: weight: expected a positive number, found {self.weight}")
        if not 0 <= self.max_broken <= 1:
            raise ValueError(f"data.images: max_broken: expected a share from 0 to 1, found {self.max_broken}")
