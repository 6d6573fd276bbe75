"""Whole optimizer steps of large towers on synthetic batches, on one process or several: what fits, and the time it
takes.

Towers have random weights, which cost the same as trained ones. Token ids or pixels stay on the host and are copied to
the device by micro-batch. All methods but the one without a gradient cache run both towers on micro-batches.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losses import InfCLLoss
from retriever.config.loss import LossConfig
from retriever.config.model import ModelConfig
from retriever.config.optim import OptimConfig
from retriever.config.run import TrainConfig
from retriever.data.length_sorting import make_micro_batches
from retriever.data.micro_batches import PreparedBatch, TextInputs
from retriever.distributed.ranks import Ranks
from retriever.models.loading.folder import Side
from retriever.models.memory import GraphMemory
from retriever.models.modality import build_towers
from retriever.models.tokenizer import TokenizedTexts
from retriever.models.towers import Towers
from retriever.training.optimization.optim import build_optimizer
from retriever.training.step import TrainStep
from retriever.utils.device import choose_precision
from scripts.benchmarks.retriever.image_pairs import RepeatedImages, build_towers_of, random_captions
from scripts.benchmarks.timing import peak_mib, reset_peak_memory, synchronize

VOCABULARY = 30522
BERT_SIZES = {"bert-base": (768, 12, 12), "bert-tiny": (32, 2, 2)}
# Expected growth of the time per pair from one size to the next, for the quadratic part of the loss.
GROWTH = 1.3
# Steps of an attempt, and the seconds from which a single step is enough.
STEPS, LONG_STEP = 2, 5.0
# Distinct images of a batch; larger batches repeat them.
DISTINCT_IMAGES = 4096


class LiteratureLoss(InfCLLoss):
    """A loss of the literature with a learned logit_scale."""

    def __init__(self, loss_of: Callable[..., Tensor], group: Any = None) -> None:
        super().__init__(symmetric=True)
        self._loss_of = partial(loss_of, group=group) if group is not None else loss_of

    def forward(self, query: Tensor, passage: Tensor, **ids: Tensor) -> Tensor:
        """The loss as in its paper. Ids are ignored."""
        return self._loss_of(query, passage, logit_scale=self.logit_scale)


@dataclass(frozen=True)
class TrainingMethod:
    """A method of training on a batch."""

    name: str
    loss: Callable[[], InfCLLoss]
    graphs: Callable[[GraphMemory], GraphMemory]
    offload: bool = False
    """Whether embeddings and their gradients are offloaded to the host."""
    linear_memory: bool = False
    """Whether memory is linear in the batch. The search then grows faster and ends at the goal."""


def keep_all_graphs(planned: GraphMemory) -> GraphMemory:
    """No gradient cache: keep the graph of every micro-batch until the loss."""
    return GraphMemory(planned.micro_batch_tokens, 2**62)


def keep_no_graphs(planned: GraphMemory) -> GraphMemory:
    """A gradient cache that keeps no graphs and leaves all memory to the loss."""
    return GraphMemory(planned.micro_batch_tokens, 0)


def keep_planned_graphs(planned: GraphMemory) -> GraphMemory:
    """A gradient cache that keeps as many graphs as fit beside the loss."""
    return planned


@dataclass(frozen=True)
class StepResult:
    """Result of a training step: the problem, or time (slowest rank), loss, and peak memory (of the rank that uses
    most)."""

    problem: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0
    loss: float = 0.0


class TowerSteps:
    """Runs steps of one pair of towers. Every attempt starts with a new optimizer.

    `towers` is a key of BERT_SIZES for two text towers with texts of `tokens` tokens, or the name of an image tower.
    """

    def __init__(self, towers: str, tokens: int, device: torch.device, ranks: Ranks | None = None) -> None:
        self.device, self.ranks, self._tokens = device, ranks or Ranks(), tokens
        self._image_text = towers not in BERT_SIZES
        result = build_towers_of(towers, lock=False) if self._image_text else bert_towers(towers, tokens)
        self.towers: Any = result.to(device)
        if device.type == "cuda":
            self.towers.enable_packing()
        self.parameters = sum(parameter.numel() for parameter in self.towers.parameters())
        self._pixels: Tensor | None = None

    def attempt(self, method: TrainingMethod, pairs: int) -> StepResult:
        """Run a step with `pairs` pairs over all ranks. The second step is measured, unless steps are long: in the
        first one the allocator requests memory from the device."""
        self._reset()
        step = batch = None
        problem, seconds, loss = "", 0.0, 0.0
        for number in range(STEPS):
            try:
                if step is None or batch is None:
                    step, batch = self._prepared(method, pairs)
                self.ranks.barrier()
                synchronize(self.device)
                began = time.perf_counter()
                loss = float(step(batch, number)[0])
                synchronize(self.device)
                seconds = time.perf_counter() - began
            except torch.OutOfMemoryError:
                problem = "out of memory"
            if self.ranks.any(bool(problem)):
                return StepResult("out of memory")
            if self.ranks.all_reduce_max(seconds) > LONG_STEP:
                break
        if not np.isfinite(loss):
            raise SystemExit(f"{method.name} at {pairs} pairs: expected a finite loss, found {loss}")
        peak = peak_mib() if self.device.type == "cuda" else 0.0
        return StepResult("", self.ranks.all_reduce_max(seconds), self.ranks.all_reduce_max(peak), loss)

    def _prepared(self, method: TrainingMethod, pairs: int) -> tuple[TrainStep, PreparedBatch]:
        """A new step, and this rank's shard of a batch."""
        ranks, towers, precision = self.ranks, self.towers, choose_precision("auto", self.device)
        towers.train()
        loss = method.loss().to(self.device)
        config = TrainConfig(
            loss=LossConfig(symmetric=True),
            optim=OptimConfig(lr=1e-6),
            batch_size=pairs,
            offload_embeddings=method.offload,
        )
        first, last = (pairs * r // ranks.world_size for r in (ranks.rank, ranks.rank + 1))
        planned = GraphMemory.plan(
            towers,
            precision,
            texts=2 * (last - first),
            workspace_mib=config.loss.workspace_mib,
            micro_batch_tokens=None,
            offload_embeddings=method.offload,
        )
        # Equal on all ranks, so that none runs out of memory while others wait for it.
        alike = (-int(ranks.all_reduce_max(-tokens)) for tokens in (planned.micro_batch_tokens, planned.graph_tokens))
        graphs = method.graphs(GraphMemory(*alike))
        optimizer = build_optimizer([*towers.named_parameters(), *loss.named_parameters()], config.optim)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        groups = self._groups(last - first, graphs.micro_batch_tokens)
        batch = PreparedBatch(groups, last - first, None, not towers.padding_free)
        return TrainStep(config, precision, towers, loss, optimizer, scaler, graphs, STEPS, ranks), batch

    def _groups(self, pairs: int, budget: int) -> list[Any]:
        """Random inputs of both towers."""
        if not self._image_text:
            sides: tuple[Side, Side] = ("query", "document")
            return [text_group(side, pairs, self._tokens, budget, self.towers) for side in sides]
        each = self.towers.image_tokens
        shape = (3, *self.towers.transform.size)
        if self._pixels is None:
            self._pixels = torch.randint(0, 256, (DISTINCT_IMAGES, *shape), dtype=torch.uint8)
        at_once = min(max(1, budget // each), DISTINCT_IMAGES)
        places = [np.arange(first, min(first + at_once, pairs)) for first in range(0, pairs, at_once)]
        texts = random_captions(pairs)
        padded = not self.towers.padding_free
        cut = make_micro_batches(texts.lengths, budget, padded=padded, device=self.towers.device.type)
        group = TextInputs("document", texts, cut)
        return [RepeatedImages(self._pixels, each, places, pairs), group]

    def _reset(self) -> None:
        """Release everything that the previous step holds."""
        self.towers.zero_grad(set_to_none=True)
        reset_peak_memory()


class Search:
    """Search for the largest batch that fits in memory.

    The batch grows from `first` by `factor` up to `goal`; then the gap between the largest batch that fits and the
    smallest that does not is bisected `halvings` times. `report` receives every attempt. A step is not run if `late`,
    given its expected seconds, returns True.

    Attributes `fits` and `fails` are the largest number of pairs that fits and the smallest that runs out of memory, or
    0.
    """

    def __init__(
        self,
        steps: TowerSteps,
        method: TrainingMethod,
        *,
        first: int,
        goal: int,
        factor: int,
        halvings: int,
        late: Callable[[float], bool],
        report: Callable[[TrainingMethod, int, StepResult], None],
    ) -> None:
        self.fits, self.fails = 0, 0
        self._steps, self._way, self._late, self._report = steps, method, late, report
        self._seconds_per_pair = 0.0
        self._sizes = self._all_sizes(first, goal, factor, halvings)

    def try_next(self) -> bool:
        """Try the next size. Returns False if there is none."""
        pairs = next(self._sizes, None)
        if pairs is None:
            return False
        expected = GROWTH * self._seconds_per_pair * pairs
        late = self._late(expected * (STEPS if expected < LONG_STEP else 1))
        attempt = StepResult("no time left") if late else self._steps.attempt(self._way, pairs)
        self._report(self._way, pairs, attempt)
        if not attempt.problem:
            self.fits, self._seconds_per_pair = pairs, attempt.seconds / pairs
        elif attempt.problem == "out of memory":
            self.fails = pairs
        else:
            self._sizes = iter(())
        return True

    def _all_sizes(self, first: int, goal: int, factor: int, halvings: int) -> Iterator[int]:
        if not self._late(0.0):
            # Compile the kernels outside of the measured steps.
            self._steps.attempt(self._way, max(first // 8, self._steps.ranks.world_size))
        size = first
        while True:
            yield size
            if self.fails or size >= goal:
                break
            size = min(size * factor, goal)
        for _ in range(halvings if self.fits and self.fails else 0):
            yield (self.fits + self.fails) // 2


def text_group(side: Side, pairs: int, tokens: int, budget: int, towers: Towers) -> TextInputs:
    """Random texts of equal length for one tower."""
    rng = np.random.default_rng(len(side))
    ids = rng.integers(5, VOCABULARY, pairs * tokens, dtype=np.int32)
    texts = TokenizedTexts(ids, np.arange(pairs + 1, dtype=np.int64) * tokens)
    cut = make_micro_batches(texts.lengths, budget, padded=not towers.padding_free, device=towers.device.type)
    return TextInputs(side, texts, cut)


def bert_towers(size: str, tokens: int) -> Towers:
    """Two BERT towers with random weights. Their tokenizer is not used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    width, layers, heads = BERT_SIZES[size]
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names.values())}, unk_token="[UNK]"))
    architecture = {
        "model_type": "bert",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
        torch.manual_seed(0)
        return build_towers(
            ModelConfig(architecture=architecture, tokenizer=folder, shared=False, max_length=max(tokens, 16))
        )
