"""The public function `retriever.zero_shot`, which evaluates an image–text model on sets of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.zero_shot.report import ZeroShotReport
from eval.zero_shot.tables import Columns
from index.progress import Progress, as_reporter
from retriever.encoding.model import Model, ModelInput, load
from retriever.errors import ArgumentError, check_paths, path_list
from retriever.evaluation.report_folder import ReportFolder
from retriever.evaluation.zero_shot import check_out, evaluate_zero_shot, open_sets
from retriever.utils.device import PrecisionChoice


@dataclass(frozen=True)
class ZeroShotEvaluation:
    """What `retriever.zero_shot` returns.

    Attributes:
        folder: Folder of the report; temporary if no `out` was given.
        report: The measures of each set in the form that reports are written from.
    """

    folder: ReportFolder
    report: ZeroShotReport

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Set -> measure, such as "acc1" or "image_retrieval_recall@5", -> value."""
        return {found.dataset.name: dict(found.result.measures) for found in self.report.sets}

    def save(self, folder: str | Path) -> Path:
        """Copy the report to a new or empty folder; returns it."""
        return self.folder.save(folder)

    def __repr__(self) -> str:
        return f"ZeroShotEvaluation({self.metrics})"


def zero_shot(
    model: ModelInput,
    data: str | Path | Sequence[str | Path],
    *,
    out: str | Path | None = None,
    split: str = "test",
    templates: str | Path | None = None,
    image: str = "",
    label: str = "",
    caption: str = "",
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    micro_batch_tokens: int | None = None,
    progress: Progress = None,
) -> ZeroShotEvaluation:
    """Score an image–text model on classification by prompts and on retrieval, without training on the sets.

    Args:
        model: A model from `retriever.load`, or its folder or hub name.
        data: One or more sets: a folder with a folder of images for each class, a webdataset folder in CLIP_benchmark's
            layout, a table (.jsonl, .csv, .tsv, .parquet) with the columns image and label, labels or captions, or a
            folder of Parquet files or of a saved Hugging Face dataset with these columns.
        out: Folder of the report; embeddings found there are reused. Default: None, a temporary folder, from which
            `ZeroShotEvaluation.save` copies the report.
        split: Folder within a set, if there is one of that name. Default: "test".
        templates: File with prompts, one per line with {c} for the class, instead of the sets' own; or a .json file
            with the prompts of each class, {"class": ["prompt", …]} (CuPL, arXiv 2209.03320). Default: None.
        image: Column of tables with the image or its path. Default: "", the usual names.
        label: Column of tables with the label. Default: "", the usual names.
        caption: Column of tables with the captions. Default: "", the usual names.
        device: Device, if `model` is a folder or name. Default: "auto".
        precision: As for `retriever.load`, if `model` is a folder or name.
        micro_batch_tokens: As for `retriever.load`, if `model` is a folder or name.
        progress: Called with a `ProgressEvent` at each step. Default: None.

    Returns:
        The measures of each set, and the report.

    Raises:
        InputError: A set cannot be read, or the model has no image tower.
        ConfigError: An argument is invalid.
    """
    paths = [Path(path) for path in path_list("data", data)]
    if not paths:
        raise ArgumentError("data", "expected at least one set of images, found none")
    if not isinstance(model, Model):
        check_paths(model=model)
    if templates is not None:
        check_paths(templates=templates)
    folder, reporter = ReportFolder(out), as_reporter(progress)
    # Before the model, which takes longer to load than a wrong folder takes to notice.
    prompts = None if templates is None else Path(templates)
    sets = open_sets(paths, split, prompts, Columns(image, label, caption))
    check_out(folder.path, sets)
    if not isinstance(model, Model):
        model = load(
            model, device=device, precision=precision, micro_batch_tokens=micro_batch_tokens, progress=reporter
        )
    towers = model.image_towers()
    report = evaluate_zero_shot(towers, sets, folder.path, model.options, reporter, details={"model": model.name})
    return ZeroShotEvaluation(folder, report)
