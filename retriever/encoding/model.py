"""A loaded model: queries, passages and images to embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from index.files import InputError
from index.passages import Passage
from index.progress import Progress, as_reporter
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.image_encoder import ImageInput, embed_images
from retriever.errors import check_at_least, check_choice, check_paths, check_unicode
from retriever.models.images.towers import ImageTextTowers
from retriever.models.loading.checksums import known_checksums
from retriever.models.modality import embeds_images, load_any_towers
from retriever.models.towers import Towers
from retriever.utils.check_progress import byte_progress
from retriever.utils.device import PrecisionChoice, choose_device, choose_encoding_precision

if TYPE_CHECKING:
    import torch

PassageInput = str | Mapping[str, str] | Passage


class Model:
    """A model that embeds queries and passages, and images if it has an image tower. Created by `retriever.load`.

    Attributes:
        name: The folder or hub name that it was loaded from.
        towers: The towers, in evaluation mode.
        options: Precision and micro-batch size.
    """

    def __init__(self, name: str, towers: Towers, options: EncodeOptions) -> None:
        self.name = name
        self.towers = towers
        self.options = options

    def __repr__(self) -> str:
        kind = "image and text" if self.embeds_images else "text"
        full = "" if self.towers.truncate_dim is None else f" of {self.towers.full_dimension}"
        return (
            f"Model({self.name!r}, dimension={self.dimension}{full}, {kind}, device={str(self.device)!r}, "
            f"precision={self.options.precision!r})"
        )

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return self.towers.dimension

    @property
    def device(self) -> torch.device:
        """The device that the towers are on."""
        return self.towers.device

    @property
    def embeds_images(self) -> bool:
        """Whether the model has an image tower."""
        return embeds_images(self.towers)

    def encode_queries(self, queries: Sequence[str], *, progress: Progress = None) -> np.ndarray:
        """Embed queries, with the model's query prompt.

        Args:
            queries: M texts, without prompts.
            progress: Called with a `ProgressEvent` after each micro-batch. Default: None.

        Returns:
            [M, D] float32 embeddings, in the order of the queries.

        Raises:
            TypeError: `queries` is one string, or contains something other than strings.
        """
        texts = _checked_texts("queries", queries)
        with as_reporter(progress).bar("encode queries", len(texts), "queries") as advance:
            return embed_texts(self.towers, texts, "query", self.options, advance)

    def encode_passages(self, passages: Sequence[PassageInput], *, progress: Progress = None) -> np.ndarray:
        """Embed passages, with the model's passage prompt.

        Args:
            passages: N texts, or mappings with "text" and an optional "title". A title is put before the text, as in
                the encoding of a corpus.
            progress: Called with a `ProgressEvent` after each micro-batch. Default: None.

        Returns:
            [N, D] float32 embeddings, in the order of the passages.

        Raises:
            TypeError: `passages` is one string, or an item is neither a text nor a mapping with a "text".
        """
        texts = _checked_texts("passages", passages)
        with as_reporter(progress).bar("encode passages", len(texts), "passages") as advance:
            return embed_texts(self.towers, texts, "document", self.options, advance)

    def encode_images(self, images: Sequence[ImageInput], *, progress: Progress = None) -> np.ndarray:
        """Embed images.

        Args:
            images: N files, or images that Pillow has opened.
            progress: Called with a `ProgressEvent` after each batch. Default: None.

        Returns:
            [N, D] float32 embeddings of unit length, in the order of the images.

        Raises:
            InputError: The model has no image tower, or a file is missing, broken or too large.
            TypeError: `images` is one image, or contains something other than files and images.
        """
        images = _checked_images(images)
        with as_reporter(progress).bar("encode images", len(images), "images") as advance:
            return embed_images(self.image_towers(), images, self.options, advance)

    def image_towers(self) -> ImageTextTowers:
        """The towers, of which one must be an image tower.

        Raises:
            InputError: The model embeds texts only.
        """
        if embeds_images(self.towers):
            return self.towers
        raise InputError(f"{self.name}: expected a model of images and texts, found one of texts only")


ModelInput = Model | str | Path


def load(
    model: str | Path,
    *,
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    micro_batch_tokens: int | None = None,
    dim: int | None = None,
    progress: Progress = None,
) -> Model:
    """Load a model for encoding.

    Args:
        model: A model folder of a training run, a sentence-transformers or transformers folder, or a hub name,
            which may end in @revision.
        device: "cpu", "cuda", "cuda:1" and so on. Default: "auto", CUDA if there is a GPU.
        precision: Precision of the towers: "fp32", "bf16" with weights in bf16, or "fp16" by autocast. Embeddings
            differ between precisions by rounding. Default: "auto", bf16 on GPUs from compute capability 8.0 on,
            otherwise fp32. On a CPU with AMX, MiniLM is about 2.5 times as fast in bf16.
        micro_batch_tokens: Tokens per forward pass, padding included. Default: None, chosen from the free memory.
        dim: Keep the first `dim` values of each embedding, at unit length, for a model trained with
            `loss.matryoshka` (arXiv 2205.13147). Default: None, all.
        progress: Called with a `ProgressEvent` while the files are checked. Default: None.

    Returns:
        The model.

    Raises:
        InputError: There is no such model, one of its files is damaged, it cannot embed texts, or its embeddings have
            fewer than `dim` values or no unit length.
        ConfigError: The device is not available, or an argument is invalid.
    """
    check_choice(get_args(PrecisionChoice), precision=precision)
    if micro_batch_tokens is not None:
        check_at_least(1, micro_batch_tokens=micro_batch_tokens)
    if dim is not None:
        check_at_least(1, dim=dim)
    check_paths(model=model)
    name, reporter = str(model), as_reporter(progress)
    size = sum(path.stat().st_size for path in known_checksums(name))
    with byte_progress(reporter, Path(name).name, size) as checked:
        chosen = choose_device(device)
        options = EncodeOptions(choose_encoding_precision(precision, chosen), micro_batch_tokens)
        towers = load_any_towers(name, chosen, checked=checked)
    if note := towers.describe_padding():
        reporter.line(note)
    if dim is not None:
        towers = _truncated(name, towers, dim)
    return Model(name, towers, options)


def as_model(model: ModelInput, progress: Progress = None, *, dim: int | None = None) -> Model:
    """The model, loaded with default options if it is given by its folder or name; truncated to `dim` values if given.

    Raises:
        InputError: As `load`.
    """
    if not isinstance(model, Model):
        return load(model, dim=dim, progress=progress)
    if dim is None:
        return model
    check_at_least(1, dim=dim)
    return Model(model.name, _truncated(model.name, model.towers, dim), model.options)


def _truncated(name: str, towers: Towers, dim: int) -> Towers:
    try:
        return towers.truncated(dim)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _checked_images(images: Sequence[ImageInput]) -> list[ImageInput]:
    from PIL.Image import Image

    if isinstance(images, str | bytes | Path | Image) or not isinstance(images, Iterable):
        raise TypeError(f"images: expected a list of files or images, found one {type(images).__name__}")
    images = list(images)
    for number, image in enumerate(images):
        if not isinstance(image, str | Path | Image):
            raise TypeError(f"images[{number}]: expected a file or an image, found {type(image).__name__}")
    return images


def _checked_texts(name: str, items: Sequence[PassageInput]) -> list[str]:
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise TypeError(f"{name}: expected a list of texts, found one {type(items).__name__}")
    texts = []
    for number, item in enumerate(items):
        if isinstance(item, Mapping) and isinstance(item.get("text"), str) and name == "passages":
            texts.append(Passage("", item.get("title") or "", item["text"]).content)
        elif isinstance(item, Passage) and name == "passages":
            texts.append(item.content)
        elif isinstance(item, str):
            texts.append(item)
        else:
            raise TypeError(f"{name}[{number}]: expected text, found {type(item).__name__}")
        check_unicode(f"{name}[{number}]", texts[-1])
    return texts
