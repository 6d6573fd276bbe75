"""Reactions to signs that training is failing: a warning, a skipped step, or a return to the last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from index.files import InputError
from index.progress import Reporter
from retriever.training.checkpoint import TrainState
from retriever.training.components import Components
from retriever.training.health.collapse import MIN_RANK, effective_rank, zero_weights
from retriever.training.health.spikes import MAX_IN_A_ROW, LossSpikes
from retriever.training.run_dir import RunFolder


class HealthWatch:
    """Watches the steps of a run.

    Args:
        components: the parts of the run. `config.loss_spikes` says what is done about a spike.
        folder: the run folder, with the checkpoints to return to.
        state: the state of the run. With "skip" and "roll_back" it keeps the recent losses, so that a resumed run does
            what an uninterrupted one would.
        reporter: receives the warnings.
    """

    def __init__(self, components: Components, folder: RunFolder, state: TrainState, reporter: Reporter) -> None:
        self._parts, self._folder, self._state, self._reporter = components, folder, state, reporter
        self._reaction = components.config.loss_spikes
        self._spikes = LossSpikes(state.losses)
        self._rank: float | None = None
        self._warned: set[str] = set()

    @property
    def rejects(self) -> Callable[[Tensor], bool] | None:
        """Function of the loss that returns whether the optimizer's step is skipped; None if no step is.

        It waits for the device.
        """
        return self._rejects if self._reaction in ("skip", "roll_back") else None

    def observe(self, embeddings: Tensor) -> None:
        """Look at the embeddings [n, D] of a logged step, on the first rank."""
        if self._parts.ranks.is_first:
            self._rank = effective_rank(embeddings)

    def start(self) -> None:
        """Warn if most weights of the towers are zero."""
        if self._parts.sharded:
            return
        zero = zero_weights(self._parts.towers)
        matrices = sum(weight.ndim > 1 for weight in self._parts.towers.parameters())
        if 2 * len(zero) > matrices:
            self._warn(
                "zero", f"{len(zero)} of {matrices} weight matrices are zero ({zero[0]}, …): is the model damaged?"
            )

    def check(self, row: dict[str, Any]) -> None:
        """Warn of what the row of a logged step shows.

        Args:
            row: the row of metrics.jsonl, with "step", "loss" and "grad_norm".
        """
        step = row["step"]
        if row["grad_norm"] == 0:
            self._warn(
                "gradient",
                f"step {step}: all gradients are 0: nothing is learnt (is the loss 0, or is every "
                f"negative masked?); this is shown once",
            )
        if self._rank is not None and self._rank < MIN_RANK:
            self._warn(
                "rank",
                f"step {step}: the embeddings have collapsed: those of the batch have an effective rank of "
                f"{self._rank:.2f}, 1 being a single vector. Lower optim.lr, lengthen optim.warmup_fraction, or raise "
                f"loss.logit_scale; this is shown once",
            )
        self._rank = None
        if self._reaction == "warn" and self._spikes.add(row["loss"]):
            self._reporter.line(
                f"step {step}: the loss {row['loss']:.4f} is a spike: the median of the logged steps before is "
                f"{self._spikes.median:.4f} (loss_spikes: skip or roll_back undo such steps)"
            )
            if self._spikes.in_a_row >= MAX_IN_A_ROW:
                # The loss has risen for good.
                self._spikes = LossSpikes()

    def after_step(self) -> None:
        """Load the newest checkpoint after a rejected step, if that is wanted."""
        if self._reaction == "roll_back" and self._spikes.in_a_row:
            parts = self._parts
            loaded = self._folder.load_newest(parts.modules, parts.optimizer, self._reporter.line)
            if loaded is None:
                self._reporter.line(f"step {self._state.step}: no checkpoint to roll back to; the step was skipped")
                return
            if loaded.scaler is not None:
                parts.scaler.load_state_dict(loaded.scaler)
            weights = f"rolled back to the weights of step {loaded.step}"
            self._reporter.line(f"step {self._state.step}: {weights}; continuing with the next batch")

    def _rejects(self, loss: Tensor) -> bool:
        value, step = float(loss), self._state.step + 1
        # A rank that did not reject the step would have other weights.
        is_spike = self._parts.ranks.any(self._spikes.add(value))
        self._state.losses = self._spikes.losses
        if not is_spike:
            return False
        median = self._spikes.median
        if self._spikes.in_a_row > MAX_IN_A_ROW:
            raise InputError(
                f"step {step}: loss {value:.4f}: {MAX_IN_A_ROW} steps in a row were far above the median {median:.4f} "
                f"of the steps before, and were skipped. Lower optim.lr, or set loss_spikes to warn"
            )
        self._reporter.line(f"step {step}: skipped: its loss {value:.4f} is a spike (median {median:.4f})")
        return True

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._reporter.line(text)
