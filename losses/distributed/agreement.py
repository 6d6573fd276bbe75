"""What ranks exchange before a loss: the sizes of their shards, and whether their arguments agree."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.distributed.communication import Communication
from losses.inputs import ContrastiveBatch, check_excluded
from losses.option_checks.masked import check_positive_pairs

MESSAGE_BYTES = 1024
MAX_COMPARED_VALUES = 24


@dataclass(frozen=True)
class Shards:
    """Sizes of the shards of all ranks. The pool is the concatenation of the ranks' passages, in rank order."""

    rank: int
    queries: tuple[int, ...]
    passages: tuple[int, ...]
    positive_given: bool
    """Whether any rank gave `positive`; then a positive may be on another rank than its query."""

    @property
    def first_passage(self) -> int:
        """Row of the pool at which this rank's passages begin."""
        return self.first(self.rank)

    def first(self, rank: int) -> int:
        """Row of the pool at which the passages of `rank` begin."""
        return sum(self.passages[:rank])

    @property
    def total_queries(self) -> int:
        return sum(self.queries)

    @property
    def pool_size(self) -> int:
        """Number of passages on all ranks."""
        return sum(self.passages)


def agree_on_batch(
    communication: Communication,
    checked: Callable[[], ContrastiveBatch],
    positive: Tensor | None,
    must_match: Mapping[str, Any],
) -> tuple[ContrastiveBatch, Shards]:
    """Check this rank's batch and exchange sizes and errors with the other ranks, through the host.

    Args:
        checked: Returns the checked batch of this rank, or raises a ValueError.
        positive: The argument `positive` of this rank.
        must_match: Values that must be the same on all ranks, by argument name. Read after `checked` has returned.

    Returns:
        The checked batch of this rank, and the shards of all ranks.

    Raises:
        ValueError: On every rank, if `checked` raises on any rank, a value of `must_match` differs, a positive or an
            excluded pair is outside the pool, or no rank has a query.
    """
    problem, batch = "", None
    try:
        batch = checked()
    except ValueError as error:
        problem = str(error)
    sizes, span, codes, values = [0, 0], [0, 0], [0] * MAX_COMPARED_VALUES, dict[str, Any]()
    if batch is not None:
        sizes = [len(batch.query), len(batch.passage)]
        if positive is not None and positive.device.type == "cpu" and len(positive):
            span = [int(extreme) for extreme in positive.aminmax()]
        values = {**must_match, "logit_scale": _number(batch.logit_scale)}
        codes[: len(values)] = [zlib.crc32(repr(value).encode()) for value in values.values()]
    excluded = batch.excluded if batch is not None and batch.excluded is not None else None
    further = batch.options.pairs if batch is not None and batch.options is not None else None
    has_pairs = any(pairs is not None and pairs.device.type == "cpu" for pairs in (excluded, further))
    header = [len(problem.encode()), *sizes, positive is not None, *span, has_pairs, *codes]
    headers = communication.gather_host(torch.tensor(header, dtype=torch.int64)).tolist()
    if any(header[0] for header in headers):
        _raise_on_all_ranks(communication, problem)
    assert batch is not None
    for index, (name, value) in enumerate(values.items(), start=7):
        other = [rank for rank, header in enumerate(headers) if header[index] != headers[communication.rank][index]]
        if any(header[index] != headers[0][index] for header in headers):
            raise ValueError(
                f"{name} differs between ranks: rank {communication.rank} has {value!r}, unlike rank {other[0]}"
            )
    queries, passages = (tuple(header[index] for header in headers) for index in (1, 2))
    shards = Shards(communication.rank, queries, passages, any(header[3] for header in headers))
    if not shards.total_queries:
        raise ValueError("query is empty on all ranks: a loss needs one query")
    for rank, header in enumerate(headers):
        if header[4] < 0 or header[5] >= shards.pool_size:
            bad = header[4] if header[4] < 0 else header[5]
            raise ValueError(f"positive must index the pool's {shards.pool_size} passages, found {bad} on rank {rank}")
    if any(header[6] for header in headers):
        # Pairs can be checked only when the sizes of all shards are known.
        try:
            if has_pairs and excluded is not None:
                check_excluded(excluded, positive, len(batch.query), shards.pool_size, shards.first_passage)
            check_positive_pairs(batch, shards.pool_size)
        except ValueError as error:
            problem = str(error)
        if communication.gather_host(torch.tensor([len(problem)], dtype=torch.int64)).any():
            _raise_on_all_ranks(communication, problem)
    return batch, shards


def _raise_on_all_ranks(communication: Communication, problem: str) -> None:
    """Raise a ValueError with the problems of all ranks; a rank without a problem passes an empty string."""
    messages = [_decoded(message) for message in communication.gather_host(_encoded(problem))]
    found = "; ".join(
        f"rank {rank}: {text}" for rank, text in enumerate(messages) if text and rank != communication.rank
    )
    raise ValueError("; ".join(part for part in (problem, found) if part))


def _number(logit_scale: Tensor) -> float | str:
    # The value of a GPU tensor is not read, to avoid a synchronization.
    return logit_scale.item() if logit_scale.device.type == "cpu" else "on a device"


def _encoded(message: str) -> Tensor:
    return torch.tensor(list(message.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")), dtype=torch.int64)


def _decoded(codes: Tensor) -> str:
    return bytes(codes.tolist()).rstrip(b"\0").decode(errors="replace")
