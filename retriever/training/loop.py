"""The loop over the steps of a run, with logging, evaluation and checkpoints."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from index.progress import Reporter
from retriever.data.micro_batches import PreparedBatch
from retriever.data.pool_false_negatives import with_pool_false_negatives
from retriever.encoding.encoder import EncodeOptions
from retriever.errors import NotFiniteError
from retriever.training.checkpoint import TrainState
from retriever.training.components import Components
from retriever.training.cuda_graphs import release_cuda_graphs, use_cuda_graphs, uses_cuda_graphs
from retriever.training.health.watch import HealthWatch
from retriever.training.objective.hardest import describe_hardest, hardest_negative
from retriever.training.objective.sources import loss_of_source
from retriever.training.objective.statistics import PartStatistics, mean_row, named_after_source, statistics_row
from retriever.training.optimization.optim import lr_factor
from retriever.training.profiler import StepProfile
from retriever.training.run_dir import RunFolder
from retriever.training.step import StepResult
from retriever.training.tracking.run_card import run_card
from retriever.training.tracking.run_log import RunLog, ThroughputMeter, format_row
from retriever.training.validation.dev_set import measure_on_ranks
from retriever.utils.interrupt import StopRequest
from retriever.utils.workers import data_workers, processors, start_workers


class TrainingLoop:
    """Makes the steps of a run from `state.step` on.

    Args:
        components: the parts of the run.
        folder: the run folder.
        state: the state of the run, which is updated.
        log: receives the rows of metrics.jsonl.
        stop: the request to stop by a signal.
        reporter: shows progress.
    """

    def __init__(
        self,
        components: Components,
        folder: RunFolder,
        state: TrainState,
        log: RunLog,
        stop: StopRequest,
        reporter: Reporter,
    ) -> None:
        self._parts = components
        self._folder = folder
        self._state = state
        self._log = log
        self._stop = stop
        self._reporter = reporter
        self._total = len(components.batches)
        self._warned_without_negatives = False
        self._watch = HealthWatch(components, folder, state, reporter)

    def run(self, *, profile: bool = False) -> None:
        """Train to the last step.

        Args:
            profile: whether to profile some of the first steps. Default: False.

        Raises:
            Interrupted: a stop was requested. The last checkpoint may be older than the last step.
            NotFiniteError: loss or gradients are not finite.
        """
        parts, state, ranks = self._parts, self._state, self._parts.ranks
        workers = data_workers(parts.config.data.workers, parts.device.type, self._total - state.step)
        if parts.config.data.workers is None and workers > 1:
            self._reporter.line(f"{workers} processes prepare batches: {processors()} processors (data.workers)")
        meter = ThroughputMeter(parts.device, ranks)
        loader: Iterable[Any] = self._load(workers, meter)
        if profile and ranks.is_first:
            loader = StepProfile(parts.device, self._folder.path).watch(loader, self._reporter.line)
        parts.towers.train()
        with (
            contextlib.ExitStack() as at_end,
            self._reporter.bar("train", self._total, "steps", done=state.step) as advance,
        ):
            self._watch.start()
            # A run that was interrupted in an evaluation starts with it.
            self._evaluate_if_due()
            for index, batch in enumerate(self._until_early_stop(loader)):
                if index == 0:
                    suffix = " (the first process)" if ranks.world_size > 1 else ""
                    self._reporter.line(parts.graphs.describe(batch.micro_batch_tokens) + suffix)
                    if uses_cuda_graphs(parts.config, parts.towers, parts.precision, batch.micro_batch_tokens):
                        use_cuda_graphs(parts.towers)
                        at_end.callback(release_cuda_graphs, parts.towers)
                        if parts.config.cuda_graphs is None:
                            self._reporter.line("CUDA graphs, because the micro-batches are small (cuda_graphs)")
                batch = with_pool_false_negatives(batch, ranks, parts.batches.known)
                self._warn_without_negatives(batch)
                is_last = state.step + 1 == self._total
                log_row = is_last or self._due("log", "checkpoint", "dev", step=state.step + 1)
                result = parts.train_step(
                    batch,
                    state.step,
                    statistics=log_row,
                    observe=self._watch.observe if log_row else None,
                    rejects=self._watch.rejects,
                )
                state.step += 1
                self._watch.after_step()
                meter.add(batch)
                self._stop.sync()
                if log_row or self._stop.requested:
                    # Before every checkpoint, because this checks that the loss is finite.
                    row = self._row(batch, result, meter)
                if log_row:
                    self._log.write(row)
                    self._watch.check(row)
                    advance(0, line := format_row(row))
                    if is_last or not self._reporter.is_live:
                        left = meter.time_left(self._total - state.step)
                        self._reporter.line(f"step {state.step}/{self._total}  {line}  left {left}")
                    if "hardest_negative" in row:
                        self._reporter.line(f"step {state.step}: {describe_hardest(row['hardest_negative'])}")
                advance(1)
                self._evaluate_if_due()
                # After the evaluation, so that the checkpoint of a step includes its result.
                if self._due("checkpoint") and not is_last:
                    self.save_checkpoint()
                if self._due("checkpoint", "dev"):
                    meter.exclude_elapsed()
                self._stop.check()
            if parts.dev_set is None:
                self._save_model()
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Save a checkpoint of the current state."""
        parts, state = self._parts, self._state
        state.scaler = parts.scaler.state_dict() or None
        self._folder.save_checkpoint(parts.modules, parts.optimizer, state, parts.config.keep_checkpoints)

    def _save_model(self) -> None:
        parts, state = self._parts, self._state
        card = run_card(
            parts.config,
            rows=parts.batches.schedule.sizes,
            sources=parts.sources,
            step=state.step,
            steps=self._total,
            device=parts.device,
            processes=parts.ranks.world_size,
            metric="" if parts.dev_set is None else parts.dev_set.metric,
            before=self._log.evaluations.get(0),
            after=self._log.evaluations.get(state.step),
            dev_fingerprint=parts.dev_fingerprint,
        )
        with parts.evaluated_weights():
            self._folder.save_model(parts.towers, parts.config, card, sharded=parts.sharded)

    def _load(self, workers: int, meter: ThroughputMeter) -> Iterator[PreparedBatch]:
        """Yield the batches from `state.step` on, with hard negatives that are mined again where that is due."""
        parts, state = self._parts, self._state
        if parts.refresh is None:
            yield from start_workers(parts.batches.loader(start=state.step, workers=workers))
            return
        while (step := state.step) < self._total:
            parts.towers.eval()
            tables = parts.refresh.tables(step, self._reporter, self._stop.check)
            parts.towers.train()
            meter.exclude_elapsed()
            stop = min(self._total, parts.refresh.next_after(step))
            yield from start_workers(parts.batches.with_tables(tables).loader(start=step, stop=stop, workers=workers))

    def _until_early_stop(self, loader: Iterable[PreparedBatch]) -> Iterator[PreparedBatch]:
        """Yield batches until dev.patience is exhausted."""
        patience, state = self._parts.config.dev.patience, self._state
        for batch in loader:
            if patience is not None and state.evaluations_without_gain >= patience:
                assert self._parts.dev_set is not None
                metric = self._parts.dev_set.metric
                self._reporter.line(
                    f"stopped early at step {state.step}: no better dev {metric} in {patience} evaluations"
                )
                return
            yield batch

    def _due(self, *events: str, step: int | None = None) -> bool:
        """Whether any of the events is due after `step` steps. Default: those that were made."""
        config, step = self._parts.config, self._state.step if step is None else step
        every = {"log": config.log_every, "checkpoint": config.checkpoint_every, "dev": config.dev.every}
        return any(step % every[event] == 0 for event in events)

    def _warn_without_negatives(self, batch: PreparedBatch) -> None:
        """Warn once about a batch in which every passage is masked for every query."""
        masks = batch.false_negatives if self._parts.config.loss.masks_false_negatives else None
        no_negatives = masks is not None and masks.no_negatives and batch.own_offsets is None
        if self._warned_without_negatives or not no_negatives:
            return
        self._warned_without_negatives = True
        self._reporter.line(
            f"step {self._state.step + 1}: no query of the batch has a negative, because the data pairs all its "
            f"passages with all its queries, directly or through shared queries: nothing is learnt from it (smaller "
            f"batches may have negatives; loss.mask_duplicates false masks none; this is shown once)"
        )

    def _row(self, batch: PreparedBatch, result: StepResult, meter: ThroughputMeter) -> dict[str, Any]:
        """Return the row of metrics.jsonl for this step. Only here the host waits for the device."""
        parts, config = self._parts, self._parts.config.optim
        objective = parts.train_step.objectives[batch.source]
        row = {
            "step": self._state.step,
            "loss": float(result.loss),
            "grad_norm": float(result.grad_norm),
            "logit_scale": loss_of_source(parts.loss, batch.source).logit_scale.item(),
            "lr": config.lr * lr_factor(self._state.step - 1, self._total, config),
            **meter.rates(),
        }
        if result.statistics:
            row |= self._statistics(result.statistics)
        # Other batches have several sources.
        if objective.name and parts.config.data.mix == "steps":
            row |= named_after_source(row, objective.name)
        row |= self._hardest_negative(result.statistics)
        # In fp16 a step with overflowing gradients is skipped and the scale is halved. A scale below 1 means that the
        # gradients themselves are not finite.
        skips_overflow = parts.scaler.is_enabled() and parts.scaler.get_scale() >= 1
        if not math.isfinite(row["loss"]) or not (math.isfinite(row["grad_norm"]) or skips_overflow):
            saved = "the last checkpoint is from before" if self._folder.has_checkpoint else "there is no checkpoint"
            raise NotFiniteError(
                f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}, logit_scale "
                f"{row['logit_scale']:.2f}: no longer finite; {saved}. Lower optim.lr, lengthen "
                f"optim.warmup_fraction, or train in fp32 or bf16"
            )
        return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}

    def _statistics(self, found: Sequence[PartStatistics]) -> dict[str, float]:
        """The numbers of a step, over all parts of its batch and, if there are several, of the source of each."""
        parts, rows = self._parts, list[dict[str, float]]()
        objectives = [parts.train_step.objectives[each.part.source] for each in found]
        for each, objective in zip(found, objectives, strict=True):
            logit_scale = loss_of_source(parts.loss, each.part.source).logit_scale
            rows.append(statistics_row(each, logit_scale, objective.loss, parts.ranks))
        if len(rows) == 1:
            return rows[0]
        row = mean_row(rows, [each.part.loss_share for each in found])
        for of_part, objective in zip(rows, objectives, strict=True):
            row |= named_after_source(of_part, objective.name)
        return row

    def _hardest_negative(self, found: Sequence[PartStatistics]) -> dict[str, Any]:
        """The texts of the hardest negative of a step, if they are wanted."""
        objectives = self._parts.train_step.objectives
        texts = [
            hardest_negative(each.hardest, each.part, objectives[each.part.source].loss)
            for each in found
            if each.hardest is not None
        ]
        scored = [each for each in texts if each is not None]
        return {"hardest_negative": max(scored, key=lambda each: each["negative_score"])} if scored else {}

    def _evaluate_if_due(self) -> None:
        """Evaluate on the dev set if it is due at this step, and save the model if it is the best one."""
        parts, state, config = self._parts, self._state, self._parts.config
        at_start = state.step == 0
        due = config.dev.at_start if at_start else self._due("dev") or state.step == self._total
        if parts.dev_set is None or not due or state.step == state.dev_step:
            return
        parts.towers.eval()
        with parts.evaluated_weights():
            measures = measure_on_ranks(
                parts.dev_set,
                parts.towers if config.dev.dim is None else parts.towers.truncated(config.dev.dim),
                self._folder.path,
                EncodeOptions(parts.precision, config.micro_batch_tokens),
                self._reporter,
                loss=parts.loss,
                tick=self._stop.check,
                ranks=parts.ranks,
                sharded=parts.sharded,
            )
        parts.towers.train()
        state.dev_step = state.step
        metric = parts.dev_set.metric
        score = measures[metric.lower()]
        self._log.write({"step": state.step, **{f"dev_{name}": value for name, value in measures.items()}})
        dev_loss = f"  loss {measures['loss']:.4f}" if "loss" in measures else ""
        if at_start:
            self._reporter.line(f"before training  dev {metric} {score:.4f}{dev_loss}")
            return
        improved = state.best_score is None or score > state.best_score
        suffix = "  best so far" if improved else f"  (best {state.best_score:.4f} at step {state.best_step})"
        self._reporter.line(f"step {state.step}  dev {metric} {score:.4f}{dev_loss}{suffix}")
        if improved:
            state.best_score, state.best_step, state.evaluations_without_gain = score, state.step, 0
            self._save_model()
        else:
            state.evaluations_without_gain += 1
