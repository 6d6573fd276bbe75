"""Whole optimizer steps of large towers on synthetic batches, by one process or several: what fits, and its time.

Towers have random weights, which cost what trained ones cost. Token ids or pixels wait on the host and micro-batches of
them visit the device; every way but the one without a gradient cache runs both towers on micro-batches.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_image_train import Pictures, build, made_texts
from torch import Tensor

from losses import InfCLLoss
from retriever.config.run import LossConfig, ModelConfig, OptimConfig, TrainConfig
from retriever.data.length_sorting import pack
from retriever.data.micro_batches import PreparedBatch, TextGroup
from retriever.distributed.ranks import Ranks
from retriever.models.loading.folder import Side
from retriever.models.memory import GraphMemory
from retriever.models.tokenizer import TokenizedTexts
from retriever.models.towers import Towers, build_towers
from retriever.training.optim import build_optimizer
from retriever.training.step import TrainStep
from retriever.utils.device import choose_precision

MIB = 2**20
VOCABULARY = 30522
BERT_SIZES = {"bert-base": (768, 12, 12), "bert-tiny": (32, 2, 2)}
# Of a step's time beside that of a smaller one: the loss's is a small part, but grows with the square.
GROWTH = 1.3
# An attempt makes so many, unless they are as long as this, in seconds.
STEPS, LONG_STEP = 2, 5.0
# Different pictures of a batch; more are the same ones again.
PICTURES = 4096


class Baseline(InfCLLoss):
    """A loss of the literature with a logit_scale that is learned."""

    def __init__(self, loss_of: Callable[..., Tensor], group: Any = None) -> None:
        super().__init__(symmetric=True)
        self._loss_of = partial(loss_of, group=group) if group is not None else loss_of

    def forward(self, query: Tensor, passage: Tensor, **ids: Tensor) -> Tensor:
        """As its paper has it, without ids."""
        return self._loss_of(query, passage, logit_scale=self.logit_scale)


@dataclass(frozen=True)
class Way:
    """How a batch is trained on."""

    name: str
    loss: Callable[[], InfCLLoss]
    graphs: Callable[[GraphMemory], GraphMemory]
    on_host: bool = False
    """Whether embeddings and their gradients wait there too."""
    endless: bool = False
    """Whether to stop at the goal."""


def all_kept(planned: GraphMemory) -> GraphMemory:
    """No gradient cache: every graph waits for the loss."""
    return GraphMemory(planned.micro_batch_tokens, 2**62)


def none_kept(planned: GraphMemory) -> GraphMemory:
    """A gradient cache that leaves all memory to the loss."""
    return GraphMemory(planned.micro_batch_tokens, 0)


def as_planned(planned: GraphMemory) -> GraphMemory:
    """A gradient cache, with as many kept graphs as memory holds beside the loss."""
    return planned


@dataclass(frozen=True)
class Attempt:
    """Why no step could be made, or time and loss of the last one, on the slowest rank, and the peak of all, on the
    fullest."""

    problem: str = ""
    seconds: float = 0.0
    peak_mib: float = 0.0
    loss: float = 0.0


class TowerSteps:
    """Makes steps of one pair of towers; each attempt begins with a fresh optimizer."""

    def __init__(self, towers: str, tokens: int, device: torch.device, ranks: Ranks | None = None) -> None:
        """`towers`: a name of BERT_SIZES for two of them on texts of `tokens` tokens; or that of a vision tower."""
        self.device, self.ranks, self._tokens = device, ranks or Ranks(), tokens
        self._pictures = towers not in BERT_SIZES
        made = build(towers, False) if self._pictures else bert_towers(towers, tokens)
        self.towers: Any = made.to(device)
        if device.type == "cuda":
            self.towers.drop_padding()
        self.parameters = sum(parameter.numel() for parameter in self.towers.parameters())
        self._pixels: Tensor | None = None

    def attempt(self, way: Way, pairs: int) -> Attempt:
        """A step of so many pairs in all: the second one, unless they are long. At the first the allocator asks the
        device for memory, which is no part of a step's time."""
        self._reset()
        step = batch = None
        problem, seconds, loss = "", 0.0, 0.0
        for number in range(STEPS):
            try:
                if step is None or batch is None:
                    step, batch = self._prepared(way, pairs)
                self.ranks.barrier()
                self._wait()
                began = time.perf_counter()
                loss = float(step(batch, number)[0])
                self._wait()
                seconds = time.perf_counter() - began
            except torch.OutOfMemoryError:
                problem = "out of memory"
            if self.ranks.any(bool(problem)):
                return Attempt("out of memory")
            if self.ranks.all_reduce_max(seconds) > LONG_STEP:
                break
        if not np.isfinite(loss):
            raise SystemExit(f"{way.name} at {pairs}: the loss is {loss}")
        peak = torch.cuda.max_memory_allocated() / MIB if self.device.type == "cuda" else 0.0
        return Attempt("", self.ranks.all_reduce_max(seconds), self.ranks.all_reduce_max(peak), loss)

    def _prepared(self, way: Way, pairs: int) -> tuple[TrainStep, PreparedBatch]:
        """A step that has not been made, and this rank's share of a batch for it."""
        ranks, towers, precision = self.ranks, self.towers, choose_precision("auto", self.device)
        towers.train()
        loss = way.loss().to(self.device)
        config = TrainConfig(
            loss=LossConfig(symmetric=True),
            optim=OptimConfig(lr=1e-6),
            batch_size=pairs,
            offload_embeddings=way.on_host,
        )
        first, last = (pairs * r // ranks.world_size for r in (ranks.rank, ranks.rank + 1))
        planned = GraphMemory.plan(
            towers,
            precision,
            texts=2 * (last - first),
            workspace_mib=config.loss.workspace_mib,
            micro_batch_tokens=None,
            offload_embeddings=way.on_host,
        )
        # Alike on all ranks, so that none runs out of memory while others wait for it.
        alike = (-int(ranks.all_reduce_max(-tokens)) for tokens in (planned.micro_batch_tokens, planned.graph_tokens))
        graphs = way.graphs(GraphMemory(*alike))
        optimizer = build_optimizer([*towers.named_parameters(), *loss.named_parameters()], config.optim)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        groups = self._groups(last - first, graphs.micro_batch_tokens)
        batch = PreparedBatch(groups, last - first, None, not towers.padding_free)
        return TrainStep(config, precision, towers, loss, optimizer, scaler, graphs, STEPS, ranks), batch

    def _groups(self, pairs: int, budget: int) -> list[Any]:
        """Random inputs of both towers."""
        if not self._pictures:
            sides: tuple[Side, Side] = ("query", "document")
            return [text_group(side, pairs, self._tokens, budget, self.towers) for side in sides]
        each = self.towers.image_tokens
        shape = (3, *self.towers.transform.size)
        if self._pixels is None:
            self._pixels = torch.randint(0, 256, (PICTURES, *shape), dtype=torch.uint8)
        at_once = min(max(1, budget // each), PICTURES)
        places = [np.arange(first, min(first + at_once, pairs)) for first in range(0, pairs, at_once)]
        texts = made_texts(pairs)
        padded = not self.towers.padding_free
        cut = pack(texts.lengths, budget, padded=padded, device=self.towers.device.type)
        group = TextGroup("document", texts, cut)
        return [Pictures(self._pixels, each, places, pairs), group]

    def _reset(self) -> None:
        """Leave nothing of the step before."""
        self.towers.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Search:
    """The most pairs whose step is made, and the fewest that run out of memory, 0 for none, by trying.

    From `first` pairs on the batch grows by `factor` up to `goal`, then the last gap is halved. `report` hears of every
    step; one of which `late` says that it would end too late, by its expected seconds, is not made.
    """

    def __init__(
        self,
        steps: TowerSteps,
        way: Way,
        *,
        first: int,
        goal: int,
        factor: int,
        halvings: int,
        late: Callable[[float], bool],
        report: Callable[[Way, int, Attempt], None],
    ) -> None:
        self.fits, self.fails = 0, 0
        self._steps, self._way, self._late, self._report = steps, way, late, report
        self._a_pair = 0.0
        self._sizes = self._all_sizes(first, goal, factor, halvings)

    def one_more(self) -> bool:
        """Try the next size; False where there is none."""
        pairs = next(self._sizes, None)
        if pairs is None:
            return False
        expected = GROWTH * self._a_pair * pairs
        late = self._late(expected * (STEPS if expected < LONG_STEP else 1))
        attempt = Attempt("no time left") if late else self._steps.attempt(self._way, pairs)
        self._report(self._way, pairs, attempt)
        if not attempt.problem:
            self.fits, self._a_pair = pairs, attempt.seconds / pairs
        elif attempt.problem == "out of memory":
            self.fails = pairs
        else:
            self._sizes = iter(())
        return True

    def _all_sizes(self, first: int, goal: int, factor: int, halvings: int) -> Iterator[int]:
        if not self._late(0.0):
            # What kernels compile at their first run is no part of a step's time.
            self._steps.attempt(self._way, max(first // 8, self._steps.ranks.world_size))
        size = first
        while True:
            yield size
            if self.fails or size >= goal:
                break
            size = min(size * factor, goal)
        for _ in range(halvings if self.fits and self.fails else 0):
            yield (self.fits + self.fails) // 2


def text_group(side: Side, pairs: int, tokens: int, budget: int, towers: Towers) -> TextGroup:
    """Random texts of one length for one tower."""
    chance = np.random.default_rng(len(side))
    ids = chance.integers(5, VOCABULARY, pairs * tokens, dtype=np.int32)
    texts = TokenizedTexts(ids, np.arange(pairs + 1, dtype=np.int64) * tokens)
    cut = pack(texts.lengths, budget, padded=not towers.padding_free, device=towers.device.type)
    return TextGroup(side, texts, cut)


def bert_towers(size: str, tokens: int) -> Towers:
    """Two BERTs with random weights; their tokenizer is not used."""
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
