"""Image and text towers on sets of images: embed, score, report; embeddings are kept and used again."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import PIL
import torch

from eval.zero_shot.data import ZeroShotSet, read_templates
from eval.zero_shot.evaluate import Evaluated, embed_set, score
from eval.zero_shot.opening import open_set
from eval.zero_shot.report import ZeroShotReport
from eval.zero_shot.report_files import write
from index.files import InputError
from index.progress import Reporter
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.image_encoder import ImageDecoder, embed_readable
from retriever.errors import ConfigError
from retriever.models.images.towers import ImageTextTowers
from retriever.models.images.transforms import open_image


def open_sets(data: Iterable[Path], split: str, templates: Path | None) -> list[ZeroShotSet]:
    """The sets in some folders and tables, with the prompts of a file in place of their own.

    Raises:
        InputError: one cannot be read, or two have the same name.
    """
    sets = [open_set(path, split) for path in data]
    if templates is not None:
        own = read_templates(templates)
        sets = [dataclasses.replace(one, templates=own, own_templates=False) if one.classes else one for one in sets]
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise InputError(f"expected sets of different names, found {', '.join(names)}")
    return sets


def check_out(out: Path, sets: Iterable[ZeroShotSet]) -> None:
    """Refuse to write into a set, whose files would be other ones the next time.

    Raises:
        ConfigError: a set would hold what `evaluate_zero_shot` writes.
    """
    sets = list(sets)
    for one in sets:
        for other in sets:
            if (out / other.name).resolve().is_relative_to(one.path.resolve()):
                raise ConfigError(f"--out: expected a folder that is not within the set {one.path}, found {out}")


def evaluate_zero_shot(
    towers: ImageTextTowers,
    sets: Sequence[ZeroShotSet],
    out: Path,
    options: EncodeOptions,
    reporter: Reporter,
    *,
    details: dict[str, Any],
) -> ZeroShotReport:
    """Score a model on every set and write the report; images embedded by an earlier run are not embedded again.

    Args:
        towers: in evaluation mode, on the device to use.
        sets: what to score it on.
        out: folder of the report; OUT/SET/images holds the embeddings.
        options: arithmetic and micro-batch size.
        reporter: shows progress.
        details: what the report states beside what is known here.

    Raises:
        InputError: a set cannot be read, or `out` holds something else.
    """
    found = [_evaluated(towers, one, out / one.name, options, reporter) for one in sets]
    how = {
        **details,
        "model sha256": towers.fingerprint()["sha256"],
        "data sha256": {one.dataset.name: one.sha256 for one in found},
        **dataclasses.asdict(options),
        "scores": "inner products of unit vectors, summed in float64, rounded to float32; ties by the data's order",
        "seed": "none: nothing is drawn at random",
        "device": str(towers.device),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, Pillow {PIL.__version__}",
    }
    report = ZeroShotReport(f"Zero-shot: {', '.join(one.name for one in sets)}", found, how)
    write(out, report, open_image)
    return report


def _evaluated(
    towers: ImageTextTowers, dataset: ZeroShotSet, folder: Path, options: EncodeOptions, reporter: Reporter
) -> Evaluated:
    with reporter.bar(f"{dataset.name}: read", len(dataset.samples), "images") as advance:
        sha256 = dataset.sha256(advance)
    started = time.perf_counter()
    with (
        reporter.bar(f"{dataset.name}: embed", len(dataset.samples), "images") as advance,
        ImageDecoder(towers) as decoder,
    ):
        images = embed_set(
            dataset,
            lambda some: embed_readable(towers, decoder, some, options),
            folder / "images",
            dim=towers.dimension,
            model=towers.fingerprint(),
            source={"sha256": sha256, "precision": options.precision},
            progress=advance,
        )
    seconds = time.perf_counter() - started
    for name, why in list(images.broken.items())[:3]:
        reporter.line(f"{dataset.name}: left out: {name}: {why}")
    if len(images.broken) > 3:
        reporter.line(f"{dataset.name}: {len(images.broken):,} images left out; report.json names them all")
    captions = sum(len(sample.captions) for sample in images.samples)
    total = captions or len(dataset.classes) * len(dataset.templates)
    with reporter.bar(f"{dataset.name}: embed", total, "texts") as advance:
        found = score(
            dataset,
            images,
            # Progress as texts pass, which a function of texts alone could not tell.
            lambda texts: embed_texts(towers, texts, "document", options, advance),
            sha256=sha256,
        )
    return dataclasses.replace(found, seconds={"images": seconds, **found.seconds})
