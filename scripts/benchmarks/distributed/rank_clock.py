"""Checks, times and measures the memory of losses over ranks on synthetic embeddings, by all ranks or the first few.

Embeddings are fp32, products bf16 by autocast, the loss symmetric. Every rank calls the same methods in the same order.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from losses import disco_clip_loss, gathered_clip_loss, inf_cl_loss, local_rows_loss, ring_clip_loss
from retriever.distributed.ranks import Ranks
from retriever.utils.device import to_device, to_host
from scripts.benchmarks.distributed.ring_plots import Spans, kernel_spans
from scripts.benchmarks.losses.loss_check import COSINE
from scripts.benchmarks.timing import MIB, peak_mib, release_memory, synchronize

Loss = Callable[..., Tensor]
# The order of the paper's table.
METHODS: dict[str, Loss] = {
    "whole matrix on every rank": gathered_clip_loss,
    "local rows (OpenCLIP)": local_rows_loss,
    "DisCo-CLIP": disco_clip_loss,
    "ring": ring_clip_loss,
    "ours: ring + tiles": partial(inf_cl_loss, symmetric=True, exchange="ring"),
    "ours: gathered + tiles": partial(inf_cl_loss, symmetric=True, exchange="gather"),
    "ours: auto": partial(inf_cl_loss, symmetric=True),
}
OURS = tuple(name for name in METHODS if name.startswith("ours"))
# Timeout of collectives. It is reached when one rank alone has run out of memory.
TIMEOUT = datetime.timedelta(seconds=120)
ROW_SECONDS, FEWEST_SAMPLES, SAMPLE_SECONDS = 4.0, 3, 0.25
# How calls are issued: one after the other; behind products that keep the device busy until all kernels of the call are
# launched, as the towers do in training; or as replays of a CUDA graph.
BACK_TO_BACK, BEHIND_WORK, CUDA_GRAPH = "", "behind other work", "in a CUDA graph"
# About 20 ms on an H200.
LEAD_PRODUCTS, LEAD_SIZE = 16, 8192
MAX_CALLS_BEHIND_WORK = 8
PROFILED_CALLS = 2
# Share of GPU memory that a rank may use. With equal shares all ranks run out of memory at the same allocation.
MEMORY_FRACTION = 0.94


def init_ranks(device: str) -> Ranks:
    """Join the processes that torchrun started: NCCL between GPUs, gloo between CPUs."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_per_process_memory_fraction(MEMORY_FRACTION)
    else:
        torch.set_num_threads(1)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    return Ranks(distributed.get_rank(), distributed.get_world_size())


@dataclass(frozen=True)
class Team:
    """The first `size` ranks, which compute one loss."""

    size: int
    group: Any
    """None if each rank has the whole batch and does not communicate."""


@dataclass(frozen=True)
class Measured:
    """Largest time and memory over ranks, or the reason why there is none."""

    milliseconds: float = 0.0
    held_mib: float = 0.0
    """Allocated before and after a call: the embeddings."""
    peak_mib: float = 0.0
    """Largest allocation within a call."""
    problem: str = ""


class RankClock:
    """Measures losses on this rank's device."""

    def __init__(self, ranks: Ranks, device: str, dim: int, samples: int, deadline: float) -> None:
        self.ranks, self.dim, self.samples, self.deadline = ranks, dim, samples, deadline
        self.cuda = device == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.everyone = Team(ranks.world_size, distributed.group.WORLD)
        self.alone = Team(1, None)
        self.each = Team(ranks.world_size, None)

    def team(self, size: int) -> Team:
        """The first `size` ranks."""
        if size == 1:
            return self.alone
        return self.everyone if size == self.ranks.world_size else Team(size, distributed.new_group(list(range(size))))

    def pairs(self, count: int, team: Team, rank: int | None = None) -> list[Tensor]:
        """Queries and passages of this (or the given) rank, and logit_scale. The batch is the same for every team.

        The cosine of a pair is about COSINE. With an easier batch the loss would be mostly rounding error.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        rank = self.ranks.rank if rank is None else rank
        own = slice(0, count)
        if team.group is not None:
            own = slice(count * rank // team.size, count * (rank + 1) // team.size)
        leaves = []
        query, noise = (torch.randn(count, self.dim, generator=generator, device=self.device) for _ in range(2))
        for side in (query, noise.add_(query, alpha=COSINE / (1 - COSINE**2) ** 0.5)):
            leaves.append(torch.nn.functional.normalize(side[own], dim=1).requires_grad_())
        return [*leaves, torch.tensor(50.0, device=self.device, requires_grad=True)]

    def step(self, method: Loss, leaves: list[Tensor], team: Team) -> list[Tensor]:
        """The loss and its gradients."""
        options = {} if team.group is None else {"group": team.group}
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = method(leaves[0], leaves[1], logit_scale=leaves[2], **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def step_from_host(self, method: Loss, leaves: list[Tensor], team: Team) -> list[Tensor]:
        """The same with embeddings that start on the host, and gradients that end there."""
        here = [to_device(leaf.detach(), self.device).requires_grad_() for leaf in leaves]
        loss, *gradients = self.step(method, here, team)
        return [loss, *(to_host(gradient) for gradient in gradients)]

    def errors(self, count: int, methods: Mapping[str, Loss]) -> dict[str, float]:
        """Largest relative error of each method's loss and gradients against float64, over all ranks."""
        wide = [leaf.detach().double().requires_grad_() for leaf in self.pairs(count, self.alone, rank=0)]
        truth = inf_cl_loss(*wide[:2], logit_scale=wide[2], symmetric=True, implementation="full")
        expected = [truth.detach(), *torch.autograd.grad(truth, wide)]
        size, rank = self.ranks.world_size, self.ranks.rank
        own = slice(count * rank // size, count * (rank + 1) // size)
        found = {}
        for name, method in methods.items():
            loss, query, passage, scale = self.step(method, self.pairs(count, self.everyone), self.everyone)
            distributed.all_reduce(scale := scale.clone())
            ours = [loss, query / size, passage / size, scale / size]
            theirs = [expected[0], expected[1][own], expected[2][own], expected[3]]
            found[name] = self.ranks.all_reduce_max(
                max(float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
            )
        return found

    def measure(
        self, method: Loss, count: int, team: Team, *, from_host: bool = False, mode: str = BACK_TO_BACK
    ) -> Measured:
        """Median time of samples of consecutive calls in the given mode, and memory."""
        problem, found = "", (0.0, 0.0, 0.0)
        if self.out_of_time():
            problem = "no time left"
        elif self.ranks.rank < team.size:
            try:
                found = self._timed(method, count, team, from_host, mode)
            except torch.OutOfMemoryError:
                problem = "out of memory"
            except torch.AcceleratorError as error:
                problem = f"failed: {str(error).splitlines()[0]}"
        release_memory()
        if self.ranks.any(bool(problem)):
            return Measured(problem=problem or "out of memory")
        return Measured(*(self.ranks.all_reduce_max(figure) for figure in found))

    def spans(self, method: Loss, count: int, team: Team) -> Spans | None:
        """Profile the kernels of a call that follows another one. Returns them on the first rank, None on the others.

        The host is then ahead of the device, as in training.
        """
        from torch.profiler import ProfilerActivity, profile

        spans = None
        if self.ranks.rank < team.size:
            leaves = self.pairs(count, team)
            for _ in range(2):
                self.step(method, leaves, team)
            # Otherwise the first transfer would include waiting for a rank that starts later.
            self.barrier(team)
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
                for _ in range(PROFILED_CALLS):
                    self.step(method, leaves, team)
                synchronize(self.device)
            spans = kernel_spans(recorded.events(), PROFILED_CALLS) if self.ranks.is_first else None
        release_memory()
        self.ranks.barrier()
        return spans

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """Capture a call, which has run before, in a CUDA graph. Returns a function that replays it."""
        graph = torch.cuda.CUDAGraph()
        # Threads of the process groups may call CUDA during the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
        return graph.replay

    def out_of_time(self, seconds: float = 0.0) -> bool:
        """Whether work of `seconds` would end after the deadline, on the clock of any rank."""
        return self.ranks.any(time.monotonic() + seconds > self.deadline)

    def barrier(self, team: Team) -> None:
        """Wait for all ranks of the team and their devices."""
        if team.group is not None:
            distributed.barrier(team.group, device_ids=[self.device.index] if self.cuda else None)
        synchronize(self.device)

    def _timed(self, method: Loss, count: int, team: Team, from_host: bool, mode: str) -> tuple[float, float, float]:
        leaves, step = self.pairs(count, team), self.step
        if from_host:
            leaves, step = [to_host(leaf.detach()) for leaf in leaves], self.step_from_host
        call: Callable[[], object] = partial(step, method, leaves, team)

        lead = torch.randn(
            3 if mode == BEHIND_WORK else 0, LEAD_SIZE, LEAD_SIZE, device=self.device, dtype=torch.bfloat16
        )

        def time_behind_work(calls: int) -> float:
            self.barrier(team)
            spans = []
            for _ in range(calls):
                for _ in range(LEAD_PRODUCTS):
                    torch.mm(lead[0], lead[1], out=lead[2])
                if team.group is not None:
                    # Synchronize the devices, so that none waits for another within the call.
                    distributed.all_reduce(lead[0, 0], group=team.group)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                spans.append((start, end))
            synchronize(self.device)
            return sum(start.elapsed_time(end) for start, end in spans) / 1000 / calls

        def sample(calls: int = 1) -> float:
            if mode == BEHIND_WORK:
                return time_behind_work(min(calls, MAX_CALLS_BEHIND_WORK))
            self.barrier(team)
            began = time.perf_counter()
            for _ in range(calls):
                call()
            synchronize(self.device)
            return (time.perf_counter() - began) / calls

        sample()
        if mode == CUDA_GRAPH:
            call = self.captured(call)
        held = 0.0
        if self.cuda:
            held = torch.cuda.memory_allocated() / MIB
            torch.cuda.reset_peak_memory_stats()
        first = torch.tensor(sample())
        if team.group is not None:
            distributed.all_reduce(first, distributed.ReduceOp.MAX, group=team.group)
        calls = max(1, round(SAMPLE_SECONDS / float(first)))
        samples = min(self.samples, max(FEWEST_SAMPLES, int(ROW_SECONDS / (calls * float(first)))))
        # A single call is enough if it takes longer than a row should.
        long = float(first) > ROW_SECONDS
        seconds = float(first) if long else statistics.median(sample(calls) for _ in range(samples))
        return 1000 * seconds, held, peak_mib() if self.cuda else 0.0
