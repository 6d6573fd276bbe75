"""What a guide, a teacher, frozen and random passages add to the plan of a run: memory, and work before it starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from retriever.config.run import TrainConfig
from retriever.data.batches import BatchDataset
from retriever.data.micro_batches import PreparedBatch
from retriever.models.modality import load_towers
from retriever.training.objective.embedded_texts import teacher_plan
from retriever.training.objective.guide import GuideModel, embedded_before
from retriever.training.objective.vectors import FrozenCorpus
from retriever.utils.device import Precision


@dataclass(frozen=True)
class FurtherMemory:
    """Bytes beside those of towers, loss and optimizer, and lines about the run."""

    resident: dict[str, float] = field(default_factory=dict)
    """Purpose -> bytes in use throughout the run."""
    step: dict[str, float] = field(default_factory=dict)
    """Purpose -> bytes in use while the loss is computed."""
    host: dict[str, float] = field(default_factory=dict)
    """Purpose -> bytes on the host, if the towers are on a GPU."""
    notes: list[str] = field(default_factory=list)


def further_memory(
    config: TrainConfig,
    batch: PreparedBatch,
    batches: BatchDataset[PreparedBatch],
    frozen: FrozenCorpus | None,
    cache: Path,
    precision: Precision,
    *,
    on_gpu: bool,
) -> FurtherMemory:
    """Plan the memory and the work before the first step.

    Args:
        config: The configuration of the run.
        batch: This process's share of the largest batch.
        batches: The training data.
        frozen: The passages of `query_only`, or None.
        cache: Folder of converted data and embedded texts.
        precision: Precision of the models.
        on_gpu: Whether the towers are on a GPU.
    """
    plan = FurtherMemory()
    texts = sum(len(group) for group in batch.groups)
    if frozen is not None:
        plan.notes.append(frozen.description)
        plan.resident["embeddings of query_only"] = float(frozen.device_bytes)
        plan.host["embeddings of query_only"] = float(frozen.host_bytes)
    if config.data.random_passages and batches.corpus is not None:
        drawn, passages = config.data.random_passages, len(batches.corpus)
        plan.notes.append(
            f"random passages: {drawn:,} of the passages of a step, over all processes, are drawn from {passages:,} of "
            f"{config.data.corpus}"
        )
    if config.loss.guide.given:
        towers = load_towers(config.loss.guide.model)
        guide = GuideModel(towers, precision, "")
        plan.step["embeddings of the guide"] = 4.0 * texts * towers.dimension
        if (before := embedded_before(config, guide, batches, cache)) is not None:
            plan.notes.append(before.plan("guide"))
        else:
            plan.notes.append(f"guide: embeds the {texts:,} texts of each step, beside the towers")
            # On a CPU they are part of this process already.
            if on_gpu:
                weights = {id(weight): weight.nbytes for weight in towers.parameters()}
                plan.resident["weights of the guide"] = float(sum(weights.values()))
    if config.loss.teacher.uses_embeddings:
        note, dimension = teacher_plan(config.loss.teacher, batches.tables, batches.corpus, cache, precision)
        plan.notes.append(note)
        plan.step["embeddings of the teacher"] = 4.0 * texts * dimension
    return plan
