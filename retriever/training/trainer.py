"""Training: batches through the towers, the loss and the optimizer, with evaluation and checkpoints on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from index.files import InputError
from index.progress import Reporter
from retriever.config.run import TrainConfig
from retriever.config.yaml_file import with_absolute_paths
from retriever.data.loading import open_training
from retriever.data.micro_batches import PreparedBatch
from retriever.distributed.agreement import ContentHash, check_same_folder, check_same_on_ranks, compared_settings
from retriever.distributed.context import rank_device
from retriever.distributed.ranks import DryRunRanks, Ranks
from retriever.encoding.encoder import EncodeOptions
from retriever.models.fsdp import shard_encoders
from retriever.models.memory import GraphMemory
from retriever.training import profiler as step_profile
from retriever.training.checkpoint import TrainState
from retriever.training.cuda_graphs import check_cuda_graphs, use_cuda_graphs
from retriever.training.false_negatives import with_pool_false_negatives
from retriever.training.loss import build_loss, check_ranks
from retriever.training.memory_plan import MemoryPlan, plan_step
from retriever.training.new_run import NewRun
from retriever.training.optim import build_optimizer
from retriever.training.run_dir import RunFolder, build_configured_towers, cache_folder, check_new_run, load_run_config
from retriever.training.run_log import NoLog, RunLog, format_row
from retriever.training.step import TrainStep
from retriever.training.throughput import ThroughputMeter
from retriever.training.validation import open_dev_set
from retriever.utils.device import choose_device, choose_precision
from retriever.utils.interrupt import Interrupted, StopRequest
from retriever.utils.torchrun import restart_count


class Trainer:
    """One training run in its folder. `Trainer.start(config)` or `Trainer.resume(run)`, then `.train()`.

    Random numbers of a step follow from the seed and the step alone, so a run that was stopped anywhere and resumed
    equals one that was not (on the CPU with the same number of threads, bit for bit).

    Of several `ranks` every one makes a trainer of the same configuration and calls the same methods. Each has its
    share of every batch; the first alone writes to the folder, which all of them see. Configuration, model, data, dev
    set, folder and checkpoint are compared before the first step; where they differ, RanksDifferError is raised on all.
    """

    def __init__(self, config: TrainConfig, run: Path, reporter: Reporter, ranks: Ranks | None = None):
        self.run = run
        self.reporter = reporter
        self.ranks = ranks = ranks or Ranks()
        self._folder = RunFolder(run, ranks)
        check_same_on_ranks(ranks, compared_settings(config))
        self._new: NewRun | None = None
        check_ranks(config, ranks)
        self.device = rank_device(choose_device(config.device))
        if self.device.index is not None:
            torch.cuda.set_device(self.device)
        # Resolved, so that what is written beside the results is what was done.
        self.precision = choose_precision(config.precision, self.device)
        torch.manual_seed(config.seed)
        self.towers = build_configured_towers(config)
        if ranks.group is not None:
            # Before they are divided, and before hours of work on the data.
            place = config.model.image.name or config.model.name or "from scratch"
            model = ContentHash(self.towers.fingerprint()["sha256"], place)
            check_same_on_ranks(ranks, {"device": self.device.type, "precision": self.precision, "model": model})
        if config.gradient_checkpointing:
            self.towers.enable_gradient_checkpointing()
        if self.device.type == "cuda":
            self.towers.drop_padding()
        if config.compile:
            self.towers.compile_layers()
        self._sharded = config.shard_towers and ranks.group is not None
        if self._sharded:
            # From the host, since no device has room for all.
            shard_encoders(self.towers, self.precision, self.device, ranks.world_size)
        self.towers.to(self.device)
        if note := self.towers.padding_note():
            reporter.line(note)
        if frozen := self.towers.frozen_note():
            reporter.line(frozen)
        self.loss = build_loss(config.loss, ranks).to(self.device)
        self.graphs = graphs = GraphMemory.plan(
            self.towers,
            self.precision,
            texts=-(-config.batch_size // ranks.world_size) * (2 + config.data.negatives),
            workspace_mib=config.loss.workspace_mib,
            micro_batch_tokens=config.micro_batch_tokens,
            offload_embeddings=config.offload_embeddings,
        )
        if config.cuda_graphs:
            check_cuda_graphs(self.towers, self.precision)
        self.config = config = dataclasses.replace(
            config, precision=self.precision, micro_batch_tokens=graphs.micro_batch_tokens
        )
        self.modules: dict[str, nn.Module] = {"towers": self.towers, "loss": self.loss}
        self.optimizer = build_optimizer(nn.ModuleDict(self.modules).named_parameters(), config.optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.dev = open_dev_set(config)
        cache = cache_folder(config, run)
        with ranks.first_rank_first():
            self.batches, sources = open_training(
                config,
                self.towers,
                cache,
                precision=self.precision,
                token_budget=graphs.micro_batch_tokens,
                reporter=reporter,
                share=ranks.share,
                planned=isinstance(ranks, DryRunRanks),
            )
        self._step = TrainStep(
            config,
            self.precision,
            self.towers,
            self.loss,
            self.optimizer,
            self.scaler,
            graphs,
            len(self.batches),
            ranks,
        )
        self.state = TrainState(sources=sources, dev="" if self.dev is None else self.dev.fingerprint)
        self._agree_on_data()

    @classmethod
    def start(
        cls, config: TrainConfig, reporter: Reporter, ranks: Ranks | None = None, *, profile: bool = False
    ) -> Trainer:
        """Begin a run in the folder `config.out`.

        Args:
            profile: whether its steps will be profiled.

        Raises:
            InputError: the folder holds a run already, or model or data cannot be used, or the steps are too few for a
                profile.
        """
        config = with_absolute_paths(config)
        check_same_folder(ranks or Ranks(), "out", Path(config.out))
        check_new_run(Path(config.out))
        new = NewRun(Path(config.out), cache_folder(config, Path(config.out)), reporter)
        writes = ranks is None or ranks.is_first
        with new.removed_on_failure() if writes else contextlib.nullcontext():
            trainer = cls(config, Path(config.out), reporter, ranks)
            if profile:
                trainer._check_profile()
            trainer._folder.begin(trainer.config)
            new.begun = True
            if restart_count():
                reporter.line(f"{_restarted()}starting from the beginning")
        trainer._new = new if writes else None
        return trainer

    @classmethod
    def resume(cls, run: Path, reporter: Reporter, ranks: Ranks | None = None) -> Trainer:
        """Go on with a run from its newest checkpoint, or from its beginning where there is none.

        Raises:
            InputError: no such run, a damaged checkpoint, or data that has changed since.
        """
        check_same_folder(ranks or Ranks(), "out", run)
        trainer = cls(load_run_config(run), run, reporter, ranks)
        # Another process that trains here holds the lock, and its checkpoints come and go.
        with trainer._folder.locked(), trainer.ranks.first_rank_first():
            trainer._load_newest()
        loaded, state = trainer._folder.loaded, trainer.state
        check_same_on_ranks(
            trainer.ranks, {"checkpoint": loaded, "step": state.step, "best dev score": state.best_score}
        )
        return trainer

    def _load_newest(self) -> None:
        loaded = self._folder.load_newest(self.modules, self.optimizer)
        if loaded is None:
            self.reporter.line(f"{_restarted()}{self.run}: no checkpoint yet; starting from the beginning")
            return
        if (loaded.sources, loaded.dev) != (self.state.sources, self.state.dev):
            raise InputError(
                f"{self.run}: the data changed since step {loaded.step}; a run goes on only with the same data"
            )
        self.state = loaded
        assert self._folder.loaded is not None
        self.reporter.line(
            f"{_restarted()}resuming from {self._folder.loaded.place} (step {loaded.step} of {len(self.batches)})"
        )
        if loaded.scaler is not None:
            self.scaler.load_state_dict(loaded.scaler)

    def _agree_on_data(self) -> None:
        """Compare what this rank is about to train on with what the others are."""
        config, state = self.config, self.state
        name = "data.images" if config.data.images else "data.sources"
        paths = [source.path for source in config.data.images] or [source.path for source in config.data.sources]
        data = {f"{name}[{i}]": ContentHash(state.sources[i], path) for i, path in enumerate(paths)}
        dev = ContentHash.of(state.dev, config.dev.path) if state.dev else None
        check_same_on_ranks(self.ranks, {**data, "dev.path": dev, "steps": len(self.batches)})

    def plan(self) -> MemoryPlan:
        """What a step will need on this process; nothing is trained."""
        config, workers = self.config, self.config.data.workers
        batch = next(iter(self.batches.loader(start=self.batches.schedule.largest_step)))
        return plan_step(
            config,
            self.towers,
            self.loss,
            self.optimizer,
            self.graphs,
            batch,
            precision=self.precision,
            ranks=self.ranks.world_size,
            # The one at hand, and two of each worker; the workers' own are theirs on the host.
            batches_waiting=self.batches.waiting(workers),
        )

    def train(self, *, profile: bool = False) -> Path:
        """Train to the last step; returns the model folder.

        Args:
            profile: show where the time of some of the next steps goes, and write their trace into the run's folder.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint has been saved.
            InputError: the loss is no longer finite, or too few steps are left for a profile.
        """
        if profile:
            self._check_profile()
        with self._folder.locked():
            log = self._open_log()
            try:
                with StopRequest(self.ranks.any if self.ranks.world_size > 1 else None) as stop:
                    try:
                        self._train_steps(log, stop, profile)
                    except Interrupted:
                        self._save_checkpoint()
                        raise
            finally:
                log.close()
        return self.run / "model"

    def removed_on_early_failure(self) -> contextlib.AbstractContextManager[None]:
        """Removes what a new run has made where the body fails before its first step; nothing is left to go on with."""
        if self._new is None:
            return contextlib.nullcontext()
        return self._new.removed_on_failure(unless=lambda: self.state.step > 0 or self._folder.has_checkpoint)

    def _check_profile(self) -> None:
        left = len(self.batches) - self.state.step
        if left < (least := step_profile.WARM_UP + step_profile.STEPS):
            raise InputError(f"--profile: expected a run of at least {least} more steps, found {left}")

    def _open_log(self) -> RunLog:
        state = self.state
        if not self.ranks.is_first:
            return NoLog()
        return RunLog(self.run, step=state.step, dev_step=state.dev_step, tensorboard=self.config.tensorboard)

    def _train_steps(self, log: RunLog, stop: StopRequest, profile: bool) -> None:
        config, state, total = self.config, self.state, len(self.batches)
        loader: Iterable[Any] = self.batches.loader(start=state.step, workers=config.data.workers)
        if profile and self.ranks.is_first:
            loader = step_profile.StepProfile(self.device, self.run).watch(loader, self.reporter.line)
        meter = ThroughputMeter(self.device, self.ranks)
        told_of_no_negatives = False
        self.towers.train()
        if config.cuda_graphs:
            use_cuda_graphs(self.towers)
        with self.reporter.bar("train", total, "steps", done=state.step) as advance:
            # A run that was stopped while it evaluated evaluates first.
            self._evaluate_if_due(log, stop)
            for number, batch in enumerate(self._until_early_stop(loader)):
                if number == 0:
                    where = " (the first process)" if self.ranks.world_size > 1 else ""
                    self.reporter.line(self.graphs.described(batch.micro_batch_tokens) + where)
                batch = with_pool_false_negatives(batch, self.ranks, self.batches.known)
                found = batch.false_negatives if config.loss.masks_false_negatives else None
                if not told_of_no_negatives and found is not None and found.no_negatives:
                    told_of_no_negatives = True
                    self.reporter.line(
                        f"step {state.step + 1}: no query of the batch has a negative, since its passages are "
                        f"positives of all its queries in the data, or share queries with such: nothing is learnt "
                        f"from it (smaller batches may have negatives; loss.mask_duplicates false keeps all; said once)"
                    )
                loss, grad_norm = self._step(batch, state.step)
                state.step += 1
                meter.add(batch)
                stop.sync()
                last = state.step == total
                row_due = last or self._due("log", "checkpoint", "dev")
                if row_due or stop.requested:
                    # Made in any case before a checkpoint, since it refuses a loss that is not finite.
                    row = self._row(loss, grad_norm, meter)
                if row_due:
                    log.write(row)
                    advance(0, line := format_row(row))
                    if last or not self.reporter.is_live:
                        left = meter.time_left(total - state.step)
                        self.reporter.line(f"step {state.step}/{total}  {line}  left {left}")
                advance(1)
                self._evaluate_if_due(log, stop)
                # After the evaluation, so that a checkpoint never lacks what its step has brought.
                if self._due("checkpoint") and not last:
                    self._save_checkpoint()
                if self._due("checkpoint", "dev"):
                    meter.skip()
                stop.check()
            if self.dev is None:
                self._save_model()
            self._save_checkpoint()

    @property
    def dev_metric(self) -> str:
        """What the kept model is best in."""
        return "" if self.dev is None else self.dev.metric

    def _until_early_stop(self, loader: Any) -> Iterator[PreparedBatch]:
        patience = self.config.dev.patience
        for batch in loader:
            if patience is not None and self.state.evaluations_without_gain >= patience:
                step, metric = self.state.step, self.dev_metric
                self.reporter.line(f"stopped early at step {step}: no better dev {metric} in {patience} evaluations")
                return
            yield batch

    def _due(self, *events: str) -> bool:
        every = {
            "log": self.config.log_every,
            "checkpoint": self.config.checkpoint_every,
            "dev": self.config.dev.every,
        }
        return any(self.state.step % every[event] == 0 for event in events)

    def _row(self, loss: Tensor, grad_norm: Tensor, meter: ThroughputMeter) -> dict[str, Any]:
        """The row of metrics.jsonl for this step; the only place where the host waits for the device."""
        row = {
            "step": self.state.step,
            "loss": float(loss),
            "grad_norm": float(grad_norm),
            "logit_scale": self.loss.logit_scale.item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            **meter.rates(),
        }
        # fp16 skips a step whose gradients overflow and halves its scale; below 1, the gradients are at fault.
        skipping = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if not math.isfinite(row["loss"]) or not (math.isfinite(row["grad_norm"]) or skipping):
            earlier = "the last checkpoint is from before" if self._folder.has_checkpoint else "no checkpoint is there"
            raise InputError(
                f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}, logit_scale "
                f"{row['logit_scale']:.2f}: no longer finite; {earlier}. Lower optim.lr, lengthen "
                f"optim.warmup_fraction, or train in fp32 or bf16"
            )
        return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}

    def _save_checkpoint(self) -> None:
        self.state.scaler = self.scaler.state_dict() or None
        self._folder.save_checkpoint(self.modules, self.optimizer, self.state, self.config.keep_checkpoints)

    def _save_model(self) -> None:
        self._folder.save_model(self.towers, self.config, divided=self._sharded)

    def _evaluate_if_due(self, log: RunLog, stop: StopRequest) -> None:
        state = self.state
        due = self._due("dev") or state.step == len(self.batches)
        if self.dev is None or not due or state.step in (0, state.dev_step):
            return
        self.towers.eval()
        measures = self._dev_measures(stop)
        self.towers.train()
        state.dev_step = state.step
        score = measures[self.dev_metric.lower()]
        log.write({"step": state.step, **{f"dev_{name}": value for name, value in measures.items()}})
        better = state.best_score is None or score > state.best_score
        self.reporter.line(
            f"step {state.step}  dev {self.dev_metric} {score:.4f}"
            + ("  best so far" if better else f"  (best {state.best_score:.4f} at step {state.best_step})")
        )
        if better:
            state.best_score, state.best_step, state.evaluations_without_gain = score, state.step, 0
            self._save_model()
        else:
            state.evaluations_without_gain += 1

    def _dev_measures(self, stop: StopRequest) -> dict[str, float]:
        assert self.dev is not None
        # Divided towers are gathered by all at the same time, so that each rank does the whole of it.
        ranks, alone = (Ranks(), str(self.ranks.rank)) if self._sharded else (self.ranks, "")
        # Fixed places, so that what a killed run left is found and cleared.
        if self.ranks.is_first:
            for left in self.run.glob(".dev*"):
                shutil.rmtree(left, ignore_errors=True)
        self.ranks.barrier()
        embeddings = self.run / f".dev{alone}"
        options = EncodeOptions(self.precision, self.config.micro_batch_tokens)
        # Of several ranks none may leave the work that they share.
        tick = stop.check if self.ranks.world_size == 1 else None
        try:
            measures = self.dev.measures(self.towers, embeddings, options, self.reporter, tick=tick, ranks=ranks)
            return self.ranks.broadcast(measures)
        finally:
            if ranks.is_first:
                shutil.rmtree(embeddings, ignore_errors=True)


def _restarted() -> str:
    """What to say first where torchrun has started the processes before."""
    return f"restarted by torchrun (attempt {restart_count()}): " if restart_count() else ""
