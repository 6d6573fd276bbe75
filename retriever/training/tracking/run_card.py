"""The model card of a training run: data, loss, hyper-parameters, metrics before and after, environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from retriever.config.dev import split_of_path
from retriever.config.images import ImageSource
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.models.card.card import CardEvaluation, CardMeasure, Estimate, ModelCard, TrainingData
from retriever.models.card.provenance import BaseModel, base_model, common_license, dataset_license, license_of
from retriever.utils.versions import COMPUTING, device_name, versions

LOSSES = {
    "inf_cl": "Inf-CL (InfoNCE over in-batch negatives in tiles, [arXiv 2410.17243](https://arxiv.org/abs/2410.17243))",
    "sigmoid": "pairwise sigmoid loss (SigLIP, [arXiv 2303.15343](https://arxiv.org/abs/2303.15343))",
    "clip": "symmetric InfoNCE on the full matrix (CLIP, [arXiv 2103.00020](https://arxiv.org/abs/2103.00020))",
}
# Measures of a dev set in the card; other measures are in metrics.jsonl.
MEASURES = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "recall@100": "recall@100"}
# Settings that say where something is, or how a run is recorded: they do not change the model.
_NOT_SHOWN = {
    "out",
    "name",
    "tokenizer",
    "sources",
    "images",
    "path",
    "paths",
    "cache",
    "log_every",
    "checkpoint_every",
}
_NOT_SHOWN |= {"keep_checkpoints", "tensorboard", "track", "plot", "workers", "query_only", "passages_on", "corpus"}
# Fields of loss.teacher that are folders.
_TEACHER_FOLDERS = {"loss.teacher.model", "loss.teacher.passages", "loss.teacher.queries"}


def run_card(
    config: TrainConfig,
    *,
    rows: Sequence[int],
    sources: Sequence[str],
    step: int,
    steps: int,
    device: torch.device,
    processes: int,
    metric: str = "",
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    dev_fingerprint: str = "",
) -> ModelCard:
    """Describe the model of a run. Equal runs give equal cards, wherever their folders are.

    Args:
        config: The configuration, with resolved values.
        rows: Number of rows of each source.
        sources: sha256 of each source.
        step: Number of steps that the model was trained for.
        steps: Number of steps of the run.
        device: Device of the run.
        processes: Number of processes.
        metric: Name of the measure that the best model is chosen by. Default: "", no dev set.
        before: Row of metrics.jsonl of the dev evaluation before training. Default: None, there is none.
        after: Row of the dev evaluation of this model. Default: None, there is none.
        dev_fingerprint: Fingerprint of the dev set. Default: "".
    """
    bases = _bases(config)
    given = config.data.listed
    name = " and ".join(base.name for base in bases) or "a new encoder"
    evaluations = () if after is None else _evaluations(config, metric, before, after, dev_fingerprint)
    return ModelCard(
        title=f"{name.rsplit('/', 1)[-1]} trained for retrieval",
        summary=(
            f"This model maps {'images and texts' if config.data.images else 'queries and passages'} to embeddings for "
            f"dense retrieval. It was trained from {name} for {step:,} of {steps:,} steps."
        ),
        base_models=tuple(base.hub_name for base in bases if base.hub_name),
        base=", ".join(map(str, bases)),
        license=common_license(bases),
        data=tuple(map(_training_data, given, rows, sources)),
        loss=_loss(config),
        settings=run_settings(config),
        evaluations=evaluations,
        environment={
            **versions(*COMPUTING),
            "device": device_name(device),
            "processes": str(processes),
        },
    )


def _bases(config: TrainConfig) -> list[BaseModel]:
    """The models that the run started from."""
    image = config.model.image
    names = [config.model.name, "" if image.is_new else image.name]
    return [base_model(name) for name in dict.fromkeys(names) if name]


def _training_data(source: SourceConfig | ImageSource, rows: int, sha256: str) -> TrainingData:
    path = Path(source.path)
    if source.format == "huggingface" and not path.exists():
        # owner/name:subset@revision
        hub_name = source.path.partition("@")[0].partition(":")[0]
        return TrainingData(source.path, rows, dataset_license(hub_name), sha256, hub_name)
    return TrainingData(path.name, rows, license_of(path), sha256)


def _loss(config: TrainConfig) -> str:
    loss = config.loss
    scale = "learned, initially" if loss.learn_logit_scale else "constant,"
    parts = [
        LOSSES[loss.name],
        "in both directions" if loss.symmetric or loss.name == "clip" else "from queries to passages",
        f"{config.data.negatives} hard negatives per query" if config.data.negatives else "no hard negatives",
        f"logit scale {scale} {loss.logit_scale:g}",
    ]
    if loss.masks_false_negatives:
        parts.append("false negatives masked")
    if config.data.random_passages:
        parts.append(f"{config.data.random_passages} random passages per step")
    if config.query_only:
        parts.append("query tower only, exact softmax over all passages of an embedding store")
    if loss.matryoshka.given:
        parts.append(
            f"summed over the first {', '.join(map(str, loss.matryoshka.dims))} dimensions (Matryoshka, "
            "[arXiv 2205.13147](https://arxiv.org/abs/2205.13147)); the embeddings can be truncated to these"
        )
    if loss.teacher.kind != "none" or loss.teacher.regression:
        teacher = Path(loss.teacher.model).name if loss.teacher.model else "given scores or embeddings"
        parts.append(f"distilled from {teacher}")
    return ", ".join(parts) + "."


def run_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the fields of a configuration that may change the model, by the names of their flags."""
    found: dict[str, Any] = {}

    def collect(value: Any, prefix: str) -> None:
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if dataclasses.is_dataclass(item):
                collect(item, f"{prefix}{field.name}.")
            elif f"{prefix}{field.name}" in _TEACHER_FOLDERS:
                continue
            elif not (field.name in _NOT_SHOWN and (not prefix.startswith(("loss.", "optim.")))) and item is not None:
                # 4 and 4.0 epochs are the same setting.
                whole = isinstance(item, float) and item.is_integer()
                found[f"{prefix}{field.name}"] = int(item) if whole else item

    collect(config, "")
    # Groups of settings that this run does not use.
    unused = {
        "model.image.": not config.data.images,
        "mining.": config.mine_every is None,
        "model.lora.": not config.model.lora.rank,
    }
    return {
        name: value for name, value in found.items() if not any(off and name.startswith(p) for p, off in unused.items())
    }


def _evaluations(
    config: TrainConfig,
    metric: str,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any],
    fingerprint: str,
) -> tuple[CardEvaluation, ...]:
    """The evaluation on each dev set. The measures of one of several sets are recorded with its name before them."""
    dev = config.dev
    if not dev.paths:
        name = Path(dev.path).name
        return (CardEvaluation(name, dev.split, _measures(metric, before, after), fingerprint.split(" ")[0]),)
    mean = CardEvaluation(f"mean of {len(dev.paths)} sets", dev.split, _measures(metric, before, after))
    found = [mean]
    for path in dev.paths:
        folder, split = split_of_path(path)
        name = Path(folder).resolve().name + (f":{split}" if split else "")
        measures = _measures(metric, before, after, f"{name}_")
        found.append(CardEvaluation(Path(folder).name, split or dev.split, measures))
    return tuple(found)


def _measures(
    metric: str, before: Mapping[str, Any] | None, after: Mapping[str, Any], prefix: str = ""
) -> tuple[CardMeasure, ...]:
    names = {metric.lower(): metric, **MEASURES}
    return tuple(
        CardMeasure(name, estimate, None if before is None else _estimate(before, prefix + key))
        for key, name in names.items()
        if (estimate := _estimate(after, prefix + key)) is not None
    )


def _estimate(row: Mapping[str, Any], measure: str) -> Estimate | None:
    value = row.get(f"dev_{measure}")
    return None if value is None else Estimate(value, row.get(f"dev_{measure}_low"), row.get(f"dev_{measure}_high"))
