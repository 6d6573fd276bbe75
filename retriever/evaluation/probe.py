"""The public function `retriever.probe`, which classifies image embeddings with training images."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.reports.markdown import cell, table
from eval.zero_shot.classification import Classification
from eval.zero_shot.data import ZeroShotSet
from eval.zero_shot.evaluate import Embedded
from eval.zero_shot.opening import open_set
from eval.zero_shot.probes import GRID, NEIGHBORS, LabeledImages, linear_probe, nearest_neighbors
from eval.zero_shot.report import title_of
from eval.zero_shot.tables import Columns
from index.files import InputError, write_json
from index.progress import Progress, as_reporter
from retriever.encoding.model import Model, ModelInput, load
from retriever.errors import ArgumentError, check_at_least, check_numbers, check_paths
from retriever.evaluation.report_folder import ReportFolder
from retriever.evaluation.zero_shot import check_out, embed_images_of
from retriever.utils.device import PrecisionChoice

REPORT_FILE = "probe.json"


@dataclass(frozen=True)
class Probe:
    """What `retriever.probe` returns.

    Attributes:
        folder: Folder of probe.json and of the embeddings; temporary if no `out` was given.
        report: The content of probe.json.
    """

    folder: ReportFolder
    report: dict[str, Any]

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """ "nearest neighbors" and "linear probe" -> measure, such as "acc1", -> value."""
        return {name: dict(self.report[name]["measures"]) for name in ("nearest neighbors", "linear probe")}

    @property
    def table(self) -> str:
        """The measures beside their chance levels, as a Markdown table."""
        found, chance = self.metrics, self.report["chance"]
        rows = [
            [title_of(name), *(f"{values[name]:.4f}" for values in found.values()), f"{chance[name]:.4f}"]
            for name in chance
        ]
        return table([cell(self.report["set"]), *found, "chance"], rows)

    def save(self, folder: str | Path) -> Path:
        """Copy the report to a new or empty folder; returns it."""
        return self.folder.save(folder)

    def __repr__(self) -> str:
        return f"Probe({self.metrics})"


def probe(
    model: ModelInput,
    data: str | Path,
    *,
    train: str | Path | None = None,
    out: str | Path | None = None,
    train_split: str = "train",
    split: str = "test",
    neighbors: int = NEIGHBORS,
    regularization: float | None = None,
    image: str = "",
    label: str = "",
    seed: int = 0,
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    micro_batch_tokens: int | None = None,
    progress: Progress = None,
) -> Probe:
    """Classify images by the embeddings of labeled training images: by nearest neighbors and by a linear probe.

    The linear probe is logistic regression (L-BFGS) whose regularization is chosen on a held-out fifth of the training
    images of each class. Nearest neighbors vote with the weights exp(cosine / 0.07).

    Args:
        model: A model from `retriever.load`, or its folder or hub name.
        data: A set of images with classes, as for `retriever.zero_shot`.
        train: The set with the training images. Default: None, `data`.
        out: Folder of the report; embeddings found there are reused. Default: None, a temporary folder.
        train_split: Folder of the training images within their set, if there is one of that name. Default: "train".
        split: Folder of the images to classify within `data`, if there is one of that name. Default: "test".
        neighbors: Number of neighbors that vote. Default: 20.
        regularization: C of the linear probe, the inverse of the strength of its penalty as in scikit-learn. Default:
            None, chosen among 0.001, 0.01, …, 1,000,000.
        image: Column of tables with the image or its path. Default: "", the usual names.
        label: Column of tables with the label. Default: "", the usual names.
        seed: Seed of the choice of held-out images. Default: 0.
        device: Device, if `model` is a folder or name. Default: "auto".
        precision: As for `retriever.load`, if `model` is a folder or name.
        micro_batch_tokens: As for `retriever.load`, if `model` is a folder or name.
        progress: Called with a `ProgressEvent` at each step. Default: None.

    Returns:
        acc1, acc5 (with five classes or more) and mean per-class recall of both, and the chosen regularization.

    Raises:
        InputError: A set cannot be read or has no classes, or training and test images are the same files.
        ConfigError: An argument is invalid.
    """
    check_paths(data=data, **({} if train is None else {"train": train}))
    if not isinstance(model, Model):
        check_paths(model=model)
    check_at_least(1, neighbors=neighbors)
    check_at_least(0, seed=seed)
    if regularization is not None:
        check_numbers(regularization=regularization)
        if not 0 < regularization < float("inf"):
            raise ArgumentError("regularization", f"expected a number over 0, found {regularization}")
    folder, reporter, columns = ReportFolder(out), as_reporter(progress), Columns(image, label, "")
    known, asked = open_set(Path(train or data), train_split, columns), open_set(Path(data), split, columns)
    sets = {"train": known, "test": asked}
    for dataset in sets.values():
        if dataset.task != "classification":
            raise InputError(f"{dataset.path}: expected images with one class each, found a set for {dataset.task}")
    if [sample.image for sample in known.samples] == [sample.image for sample in asked.samples]:
        raise InputError(
            f"{asked.path}: expected test images apart from the training images, found the same; give a set with the "
            f"splits {train_split} and {split}, or two sets"
        )
    check_out(folder.path, sets.values())
    if not isinstance(model, Model):
        model = load(
            model, device=device, precision=precision, micro_batch_tokens=micro_batch_tokens, progress=reporter
        )
    towers = model.image_towers()
    images, sha256 = {}, {}
    for name, dataset in sets.items():
        store = folder.path / "images" / name
        embedded, sha256[name] = embed_images_of(towers, dataset, store, model.options, reporter)
        images[name] = embedded
    fitted, tested = (_labeled(sets[name], images[name], known.classes) for name in sets)
    by_neighbors = nearest_neighbors(fitted, tested, known.classes, neighbors=neighbors)
    with reporter.bar("linear probe", len(GRID) + 1 if regularization is None else 1, "fits") as advance:
        linear = linear_probe(fitted, tested, known.classes, regularization=regularization, seed=seed, progress=advance)
    report = {
        "set": asked.name,
        "model": model.name,
        "model sha256": towers.sha256(),
        "data sha256": sha256,
        "images": {name: len(found.samples) for name, found in images.items()},
        "broken": {name: found.broken for name, found in images.items()},
        "classes": len(known.classes),
        "chance": linear.result.chance,
        "nearest neighbors": {"neighbors": neighbors, **_json(by_neighbors)},
        "linear probe": {
            "regularization": linear.regularization,
            "held-out acc1": {f"{value:g}": accuracy for value, accuracy in linear.held_out.items()},
            "seed": seed,
            **_json(linear.result),
        },
        **dataclasses.asdict(model.options),
    }
    write_json(folder.path / REPORT_FILE, report)
    # As it is read from the file.
    return Probe(folder, json.loads(json.dumps(report)))


def _labeled(dataset: ZeroShotSet, images: Embedded, classes: tuple[str, ...]) -> LabeledImages:
    """Embedded images with the numbers of their classes in `classes`.

    Raises:
        InputError: a class is none of `classes`.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for sample in images.samples:
        name = dataset.classes[sample.labels[0]]
        if name not in numbers:
            place = f"{dataset.path}: {sample.image.name}"
            raise InputError(f"{place}: expected a class of the training images, found {name!r:.60}")
        labels.append(numbers[name])
    return LabeledImages(images.vectors, np.array(labels, dtype=np.int64))


def _json(result: Classification) -> dict[str, Any]:
    return {"measures": result.measures, "by class": [dataclasses.asdict(row) for row in result.per_class]}
