"""Zero-shot evaluation of an image–text model on image sets: embed, score, report."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import PIL
import torch

from eval.zero_shot.data import ZeroShotSet, with_prompts
from eval.zero_shot.evaluate import Embedded, Evaluated, embed_set, score
from eval.zero_shot.opening import open_set
from eval.zero_shot.report import ZeroShotReport
from eval.zero_shot.report_files import write
from eval.zero_shot.tables import ANY_COLUMNS, Columns
from index.files import InputError
from index.progress import Reporter
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.image_encoder import ImageDecoder, embed_readable
from retriever.encoding.image_store import SHOWN_BROKEN
from retriever.errors import ArgumentError
from retriever.models.images.towers import ImageTextTowers
from retriever.models.images.transforms import open_image


def open_sets(
    data: Iterable[Path], split: str, templates: Path | None, columns: Columns = ANY_COLUMNS
) -> list[ZeroShotSet]:
    """Open image sets.

    Args:
        data: folders and tables.
        split: the name of the split, for sets that have splits.
        templates: a file of prompts that replace those of the sets, see `with_prompts`. None: keep those of the sets.
        columns: the columns of tables. Default: those of the usual names.

    Raises:
        InputError: a set cannot be read, or two sets have the same name.
    """
    sets = [open_set(path, split, columns) for path in data]
    if templates is not None:
        sets = [with_prompts(dataset, templates) if dataset.classes else dataset for dataset in sets]
    names = [dataset.name for dataset in sets]
    if len(set(names)) < len(names):
        raise InputError(f"expected sets of different names, found {', '.join(names)}")
    return sets


def check_out(out: Path, sets: Iterable[ZeroShotSet]) -> None:
    """Check that the report would not be written into a set, which would change the set.

    Raises:
        ArgumentError: it would; the message names the set.
    """
    sets = list(sets)
    for dataset in sets:
        for other in sets:
            if (out / other.name).resolve().is_relative_to(dataset.path.resolve()):
                raise ArgumentError("out", f"expected a folder that is not within the set {dataset.path}, found {out}")


def evaluate_zero_shot(
    towers: ImageTextTowers,
    sets: Sequence[ZeroShotSet],
    out: Path,
    options: EncodeOptions,
    reporter: Reporter,
    *,
    details: dict[str, Any],
) -> ZeroShotReport:
    """Evaluate a model on every set and write the report; image embeddings of an earlier run are reused.

    Args:
        towers: the model in evaluation mode, on the device to use.
        sets: the image sets.
        out: the folder of the report; OUT/SET/images holds the embeddings.
        options: precision and micro-batch size.
        reporter: shows progress.
        details: what the report states about the model, in addition to hashes and versions.

    Returns:
        The report that was written.

    Raises:
        InputError: a set cannot be read, or `out` holds something else.
    """
    results = [_evaluate(towers, dataset, out / dataset.name, options, reporter) for dataset in sets]
    details = {
        **details,
        "model sha256": towers.sha256(),
        "data sha256": {result.dataset.name: result.sha256 for result in results},
        **dataclasses.asdict(options),
        "scores": "inner products of unit vectors, summed in float64, rounded to float32; ties in data order",
        "seed": "none: nothing is drawn at random",
        "device": str(towers.device),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}",
    }
    report = ZeroShotReport(f"Zero-shot: {', '.join(dataset.name for dataset in sets)}", results, details)
    write(out, report, open_image)
    return report


def embed_images_of(
    towers: ImageTextTowers, dataset: ZeroShotSet, folder: Path, options: EncodeOptions, reporter: Reporter
) -> tuple[Embedded, str]:
    """Embed the images of a set into the store in `folder`; return them with the sha256 of the set.

    Raises:
        InputError: an image cannot be read from its tar or table, or `folder` holds something else.
    """
    for notice in dataset.notices:
        reporter.line(f"{dataset.name}: {notice}")
    with reporter.bar(f"{dataset.name}: read", len(dataset.samples), "images") as advance:
        sha256 = dataset.sha256(advance)
    with (
        reporter.bar(f"{dataset.name}: embed", len(dataset.samples), "images") as advance,
        ImageDecoder(towers) as decoder,
    ):
        images = embed_set(
            dataset,
            lambda batch: embed_readable(towers, decoder, batch, options),
            folder,
            dim=towers.dimension,
            model=towers.fingerprint(),
            source={"sha256": sha256, "precision": options.precision},
            progress=advance,
        )
    for name, reason in list(images.broken.items())[:SHOWN_BROKEN]:
        reporter.line(f"{dataset.name}: left out: {name}: {reason}")
    if len(images.broken) > SHOWN_BROKEN:
        reporter.line(f"{dataset.name}: {len(images.broken):,} images left out; the report names them all")
    return images, sha256


def _evaluate(
    towers: ImageTextTowers, dataset: ZeroShotSet, folder: Path, options: EncodeOptions, reporter: Reporter
) -> Evaluated:
    started = time.perf_counter()
    images, sha256 = embed_images_of(towers, dataset, folder / "images", options, reporter)
    seconds = time.perf_counter() - started
    captions = sum(len(sample.captions) for sample in images.samples)
    total = captions or sum(map(len, dataset.prompts))
    with reporter.bar(f"{dataset.name}: embed", total, "texts") as advance:
        result = score(
            dataset,
            images,
            # Reports progress per micro-batch; `score` could report it per call only.
            lambda texts: embed_texts(towers, texts, "document", options, advance),
            sha256=sha256,
        )
    return dataclasses.replace(result, seconds={"images": seconds, **result.seconds})
