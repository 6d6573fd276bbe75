"""The model card of a model folder: a README.md with metadata that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from index.files import InputError
from index.records import read_lines
from retriever.models.card.usage import FOLDER, describe_towers, usage_examples
from retriever.models.loading.checksums import CHECKSUM_FILE

CARD_FILE = "README.md"
"""Name of the card in a model folder."""
TAGS = ("sentence-transformers", "sentence-similarity", "feature-extraction", "dense-retrieval", "dense-retriever")


@dataclass(frozen=True)
class TrainingData:
    """A source of training data in a card."""

    name: str
    """Hub name, or the last part of a local path."""
    rows: int
    license: str = ""
    """License, as the source states it; "" if it states none."""
    sha256: str = ""
    """sha256 of the rows."""
    hub_name: str = ""
    """Name of the dataset on the hub; "" for local data."""


@dataclass(frozen=True)
class Estimate:
    """The mean of a measure over queries, with its 95 % confidence interval if it is known."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({self.low:.4f} to {self.high:.4f})"
        return f"{self.value:.4f}{interval}"


@dataclass(frozen=True)
class CardMeasure:
    """A measure before and after training."""

    name: str
    after: Estimate
    before: Estimate | None = None


@dataclass(frozen=True)
class CardEvaluation:
    """An evaluation in a card."""

    dataset: str
    split: str
    measures: tuple[CardMeasure, ...]
    sha256: str = ""
    """Fingerprint of queries, corpus and judgements."""


@dataclass(frozen=True)
class ModelCard:
    """What a card says beyond what the model itself shows. Training fills it; merging and other tools can, too."""

    title: str
    summary: str
    """One or two sentences: what was done to which model."""
    base_models: tuple[str, ...] = ()
    """Hub names of the models that this one was made from."""
    base: str = ""
    """The base model with its revision, in words."""
    relation: str = "finetune"
    """The hub's relation to `base_models`: "finetune", "merge", "quantized" or "adapter". Default: "finetune"."""
    license: Mapping[str, str] = field(default_factory=dict)
    """License in the header: `license`, and for `other` also `license_name` and `license_link`; {} if not known."""
    data: tuple[TrainingData, ...] = ()
    loss: str = ""
    """The loss in words."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters, by name."""
    evaluations: tuple[CardEvaluation, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """Name -> version of packages, and the device."""


def write_card(folder: Path, towers: Any, card: ModelCard) -> None:
    """Write the card of a complete model folder, which lists the checksums of `retriever.sha256`.

    Args:
        folder: The model folder, after `write_checksums`.
        towers: The towers that were saved to it.
        card: What the card says.
    """
    (folder / CARD_FILE).write_text(card_text(towers, card, _checksums(folder)), encoding="utf-8")


def card_text(towers: Any, card: ModelCard, checksums: Mapping[str, str]) -> str:
    """Return the card as Markdown with a YAML header.

    Args:
        towers: The towers.
        card: What the card says.
        checksums: File -> sha256.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("retriever.models.card", "."),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _cell
    text = environment.get_template("template.md").render(
        card=card,
        folder=FOLDER,
        model=describe_towers(towers),
        examples=usage_examples(towers),
        checksums=checksums,
    )
    return f"---\n{_metadata(card).to_yaml()}\n---\n\n{text}"


def _metadata(card: ModelCard) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information retrieval",
            dataset_type="unknown",
            dataset_name=evaluation.dataset,
            dataset_split=evaluation.split,
            metric_type=measure.name.lower(),
            metric_name=measure.name,
            metric_value=round(measure.after.value, 4),
        )
        for evaluation in card.evaluations
        for measure in evaluation.measures
    ]
    datasets = list(dict.fromkeys(data.hub_name for data in card.data if data.hub_name))
    return ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=list(TAGS),
        base_model=list(card.base_models) or None,
        base_model_relation=card.relation if card.base_models else None,
        datasets=datasets or None,
        license=card.license.get("license"),
        license_name=card.license.get("license_name"),
        license_link=card.license.get("license_link"),
        model_name=card.title if results else None,
        eval_results=results or None,
    )


def _cell(value: Any) -> str:
    """Format a value for a cell of a Markdown table."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _checksums(folder: Path) -> dict[str, str]:
    file = folder / CHECKSUM_FILE
    try:
        pairs = [line.split("  ", 1) for line in read_lines(file)]
        return {name: checksum for checksum, name in pairs}
    except ValueError:
        raise InputError(f"{file}: expected a sha256 and a file name in each line") from None
