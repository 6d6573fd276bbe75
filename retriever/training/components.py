"""Build what a training run computes with: towers, loss, optimizer, dev set and batches."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from index.progress import Reporter
from index.store.reader import EmbeddingStore
from losses import InfCLLoss, SigmoidLoss
from retriever.config.run import TrainConfig
from retriever.data.false_negatives import Integers
from retriever.data.loading import open_training_data
from retriever.data.table import ExampleTable
from retriever.distributed.agreement import ContentHash, check_same_on_ranks, compared_settings
from retriever.distributed.context import rank_device
from retriever.distributed.ranks import DryRunRanks, Ranks
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.model import Model
from retriever.errors import ConfigError
from retriever.mining.clusters import cluster_rows
from retriever.mining.refresh import NegativeRefresh
from retriever.models.fsdp import shard_encoders
from retriever.models.loading.lora import cast_base
from retriever.models.loading.quantized_linear import quantize_base
from retriever.models.memory import GraphMemory
from retriever.models.passage_side import freeze_passage_side
from retriever.training.cuda_graphs import can_use_cuda_graphs, check_cuda_graphs
from retriever.training.objective.checks import check_dimension, check_objective
from retriever.training.objective.guide import Guides, embed_before, embedded_before, open_guide
from retriever.training.objective.loss import build_losses, check_ranks
from retriever.training.objective.sources import SourceLosses
from retriever.training.objective.stored import open_stored_embeddings
from retriever.training.objective.vectors import planned_device_bytes
from retriever.training.optimization.average import WeightAverage
from retriever.training.optimization.optim import build_optimizer
from retriever.training.optimization.rates import learning_rates
from retriever.training.run_dir import build_configured_towers, cache_folder
from retriever.training.step import TrainStep
from retriever.training.validation.dev_set import DevSet
from retriever.training.validation.dev_sets import open_dev_set
from retriever.utils.device import Precision, choose_device, choose_precision, loss_device


@dataclass(frozen=True)
class Components:
    """The parts of a training run on this rank."""

    config: TrainConfig
    """The configuration, with `precision` and `micro_batch_tokens` as they were chosen."""
    ranks: Ranks
    device: torch.device
    precision: Precision
    towers: Any
    loss: InfCLLoss | SigmoidLoss | SourceLosses
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None
    """Moving average of the weights of the towers."""
    graphs: GraphMemory
    dev_set: DevSet | None
    batches: Any
    """Has a length, the number of steps, and `loader(start=, workers=)` of PreparedBatch."""
    sources: tuple[str, ...]
    """sha256 of the examples of each source."""
    sharded: bool
    """Whether the encoders are sharded over the ranks."""
    train_step: TrainStep
    modules: dict[str, nn.Module]
    """The modules that a checkpoint contains, by name."""
    refresh: NegativeRefresh | None = None
    """Mines hard negatives during training."""

    def evaluated_weights(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the towers have the weights that are evaluated and saved: their average, with optim.ema."""
        return contextlib.nullcontext() if self.average is None else self.average.swapped_in()

    @property
    def dev_fingerprint(self) -> str:
        """Fingerprint of the dev set; empty without one."""
        return "" if self.dev_set is None else self.dev_set.fingerprint


def build_components(config: TrainConfig, run: Path, reporter: Reporter, ranks: Ranks) -> Components:
    """Build the parts of a run. Every rank must call it with the same configuration.

    Args:
        config: the configuration.
        run: the run folder.
        reporter: receives messages about model and data.
        ranks: the ranks.

    Raises:
        ConfigError: the configuration does not fit the device, the ranks or the model.
        InputError: model or data cannot be read.
        RanksDifferError: settings, model, data or dev set differ between ranks.
    """
    check_same_on_ranks(ranks, compared_settings(config))
    check_ranks(config, ranks)
    check_objective(config)
    device = rank_device(choose_device(config.device))
    if device.index is not None:
        torch.cuda.set_device(device)
    precision = choose_precision(config.precision, device)
    torch.manual_seed(config.seed)
    sharded = config.shard_towers and ranks.group is not None
    towers = _build_towers(config, device, precision, ranks, sharded)
    check_dimension(config, towers.dimension)
    if config.dev.dim is not None:
        # Refused now if the model has fewer dimensions.
        towers.truncated(config.dev.dim)
    for note in (towers.describe_padding(), towers.describe_frozen()):
        if note:
            reporter.line(note)
    guide_model = open_guide(config, device, precision, ranks)
    loss = build_losses(config, ranks).to(loss_device(device))
    reserved = 0
    if config.query_only:
        store = EmbeddingStore.open(config.query_only)
        reserved = planned_device_bytes(store, config.passages_on, loss_device(device), precision)
    graphs = GraphMemory.plan(
        towers,
        precision,
        texts=-(-(config.batch_size * config.data.texts_per_query + config.data.random_passages) // ranks.world_size),
        workspace_mib=config.loss.workspace_mib,
        micro_batch_tokens=config.micro_batch_tokens,
        offload_embeddings=config.offload_embeddings,
        cuda_graphs=config.cuda_graphs if can_use_cuda_graphs(config, towers, precision) else False,
        reserved=reserved,
    )
    if config.cuda_graphs:
        check_cuda_graphs(towers, precision)
    # The saved configuration has the values that were used, not "auto" and None.
    config = dataclasses.replace(config, precision=precision, micro_batch_tokens=graphs.micro_batch_tokens)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    dev_set = open_dev_set(config.dev, images=bool(config.model.image.name), batch_size=config.batch_size)
    model = Model("the model of the run", towers, EncodeOptions(precision, graphs.micro_batch_tokens))
    with ranks.first_rank_first():
        batches, sources = open_training_data(
            config,
            towers,
            cache_folder(config, run),
            precision=precision,
            token_budget=graphs.micro_batch_tokens,
            reporter=reporter,
            share=ranks.share,
            dry_run=isinstance(ranks, DryRunRanks),
            cluster=lambda table: _clusters(config, model, table, cache_folder(config, run), reporter),
        )
    stored = None
    # --dry-run does not embed texts with a teacher.
    if config.query_only or (config.loss.teacher.uses_embeddings and not isinstance(ranks, DryRunRanks)):
        stored = open_stored_embeddings(
            config,
            towers,
            batches,
            cache_folder(config, run),
            device=device,
            precision=precision,
            reporter=reporter,
            ranks=ranks,
        )
        batches.stored = stored.lookup
        # A run resumes only with the same embeddings, as with the same data.
        sources = (*sources, *stored.lookup.checksums)
    if config.query_only:
        freeze_passage_side(towers)
    average = None if config.optim.ema is None else WeightAverage(towers, config.optim.ema)
    trained = nn.ModuleDict({"towers": towers, "loss": loss})
    if stored is not None and stored.teacher is not None and stored.teacher.projection is not None:
        trained["teacher"] = stored.teacher
    rates = learning_rates(towers, loss, config.optim)
    optimizer = build_optimizer(trained.named_parameters(), config.optim, rates)
    modules = {**dict(trained.named_children()), **({} if average is None else {"average": average})}
    guide: Guides | None = guide_model
    if guide_model is not None:
        # A run resumes only with the same guide, as with the same data.
        sources = (*sources, guide_model.sha256)
        texts = embedded_before(config, guide_model, batches, cache_folder(config, run))
        if texts is None:
            batches.prepare = guide_model.preparer(batches.prepare, graphs.micro_batch_tokens)
        elif isinstance(ranks, DryRunRanks):
            guide = None
        else:
            guide = embed_before(guide_model, texts, batches, cache_folder(config, run), reporter=reporter, ranks=ranks)
    train_step = TrainStep(
        config, precision, towers, loss, optimizer, scaler, graphs, len(batches), ranks, average, stored, guide
    )
    refresh = None
    if config.mine_every is not None:
        refresh = NegativeRefresh(config, batches.tables, model, run, ranks)
    components = Components(
        config=config,
        ranks=ranks,
        device=device,
        precision=precision,
        towers=towers,
        loss=loss,
        optimizer=optimizer,
        scaler=scaler,
        average=average,
        graphs=graphs,
        dev_set=dev_set,
        batches=batches,
        sources=sources,
        sharded=sharded,
        train_step=train_step,
        refresh=refresh,
        modules=modules,
    )
    _check_same_data(components)
    return components


def _clusters(
    config: TrainConfig, model: Model, table: ExampleTable, cache: Path, reporter: Reporter
) -> list[Integers]:
    """The topic clusters of a table, by the model as it is before training."""
    assert config.data.clusters is not None
    was_training = model.towers.training
    model.towers.eval()
    try:
        return cluster_rows(
            model,
            table,
            config.data.clusters,
            minimum=config.batch_size,
            seed=config.seed,
            cache=cache,
            reporter=reporter,
        )
    finally:
        model.towers.train(was_training)


def _build_towers(config: TrainConfig, device: torch.device, precision: Precision, ranks: Ranks, sharded: bool) -> Any:
    """Build the towers on the device, in training mode as configured."""
    towers = build_configured_towers(config)
    if ranks.group is not None:
        # Compared now, before the weights are sharded and the data is read.
        location = config.model.image.name or config.model.name or "from scratch"
        model = ContentHash(towers.fingerprint()["sha256"], location)
        check_same_on_ranks(ranks, {"device": device.type, "precision": precision, "model": model})
    lora = config.model.lora
    if lora.rank and lora.base == "nf4":
        quantize_base(towers.encoders)
    if lora.rank and (lora.base == "bf16" or (lora.base != "fp32" and precision == "bf16" and not sharded)):
        if precision != "bf16":
            raise ConfigError(f"model.lora.base: expected auto or fp32 with precision {precision}, found bf16")
        cast_base(towers.encoders, torch.bfloat16)
    if config.gradient_checkpointing:
        towers.enable_gradient_checkpointing()
    if device.type == "cuda":
        towers.enable_packing()
    if config.compile:
        towers.compile_layers()
    if sharded:
        # Sharded on the host, because the full weights may not fit on the device.
        shard_encoders(towers, precision, device, ranks.world_size)
    towers.to(device)
    return towers


def _check_same_data(components: Components) -> None:
    """Check that sources, dev set and number of steps are the same on all ranks."""
    config = components.config
    name = "data.images" if config.data.images else "data.sources"
    paths = [source.path for source in config.data.listed]
    data = {f"{name}[{i}]": ContentHash(components.sources[i], path) for i, path in enumerate(paths)}
    dev_paths = config.dev.path or ", ".join(config.dev.paths)
    dev = ContentHash.of(components.dev_fingerprint, dev_paths) if components.dev_set is not None else None
    steps = len(components.batches)
    check_same_on_ranks(components.ranks, {**data, "dev.path" if config.dev.path else "dev.paths": dev, "steps": steps})
