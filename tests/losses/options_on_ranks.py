"""One rank of several: matryoshka and teachers over a group compared with one process. Run by test_options_on_ranks.py.

On CPUs over gloo, or with the argument "cuda" on GPUs: one for each rank by NCCL, otherwise shared through the host.
"""

from __future__ import annotations

import itertools
import os
import sys
from typing import Any

import torch
from loss_on_gpu_ranks import HostCommunication
from torch import Tensor, distributed
from torch.nn.functional import normalize

from losses import inf_cl_loss
from losses.options import Matryoshka, Teacher, TeacherScores

DIMENSIONS = 21
SHARDS = {
    2: ([5, 9], [8, 9]),
    3: ([7, 0, 11], [7, 0, 15]),
    4: ([6, 1, 0, 8], [8, 1, 5, 8]),
}
KINDS = ("matryoshka", "teacher", "kl", "margin_mse")


def whole_options(kind: str, queries: int, passages: int, dtype: torch.dtype) -> dict[str, Any]:
    """The option of the whole batch."""
    generator = torch.Generator().manual_seed(4)
    if kind == "matryoshka":
        return {"matryoshka": Matryoshka((5, 12, 17), (1.0, 0.5, 2.0))}
    if kind == "teacher":
        sides = (torch.randn(rows, 6, generator=generator) for rows in (queries, passages))
        query, passage = (normalize(side, dim=1).to(dtype) for side in sides)
        return {"teacher": Teacher(query, passage, 9.0, 0.8)}
    lengths = torch.randint(5, (queries,), generator=generator)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    rows = torch.randint(passages, (int(offsets[-1]),), generator=generator)
    scores = torch.randn(len(rows), generator=generator)
    return {"teacher": TeacherScores(rows, offsets, scores, kind, 2.0, 0.3)}  # type: ignore[arg-type]


def own_options(options: dict[str, Any], queries: list[int], passages: list[int], rank: int, device: str) -> Any:
    """The part of one rank."""
    teacher = options.get("teacher")
    if isinstance(teacher, Teacher):
        query, passage = teacher.query.split(queries)[rank], teacher.passage.split(passages)[rank]
        return {"teacher": Teacher(query.to(device), passage.to(device), teacher.scale, teacher.weight)}
    if isinstance(teacher, TeacherScores):
        first = sum(queries[:rank])
        offsets = teacher.offsets[first : first + queries[rank] + 1]
        start, stop = int(offsets[0]), int(offsets[-1])
        own = (teacher.passages[start:stop], offsets - start, teacher.scores[start:stop])
        return {
            "teacher": TeacherScores(*(each.to(device) for each in own), teacher.kind, teacher.scale, teacher.weight)
        }
    return options


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [each.double().cpu() for each in (loss.detach(), *torch.autograd.grad(0.7 * loss, leaves))]


def errors(
    group: Any, size: int, kind: str, dtype: torch.dtype, masked: bool, device: str, logit_scale: float, **options: Any
) -> list[float]:
    """Relative errors of value and averaged gradients against float64 in one process."""
    rank, (queries, passages) = distributed.get_rank(), SHARDS[size]
    generator = torch.Generator().manual_seed(0)
    sides = (torch.randn(sum(rows), DIMENSIONS, generator=generator) for rows in (queries, passages))
    query, passage = (normalize(side, dim=1).to(dtype) for side in sides)
    firsts = [0, *itertools.accumulate(passages)]
    positive = torch.cat([torch.arange(count) + first for count, first in zip(queries, firsts, strict=False)])
    ids = torch.arange(sum(passages)) % 11 if masked else None
    if masked:
        positive = torch.randperm(sum(passages), generator=generator)[: sum(queries)]
    option = whole_options(kind, sum(queries), sum(passages), dtype)
    wide = [each.double().requires_grad_() for each in (query, passage, torch.tensor(logit_scale))]
    truth = inf_cl_loss(
        wide[0], wide[1], logit_scale=wide[2], positive=positive, passage_ids=ids, implementation="full",
        symmetric=options["symmetric"], **option,
    )  # fmt: skip
    expected = gradients(truth, wide)

    leaves = [query.split(queries)[rank], passage.split(passages)[rank]]
    leaves.append(torch.tensor(logit_scale, dtype=torch.promote_types(dtype, torch.float32)))
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    loss = inf_cl_loss(
        leaves[0], leaves[1], logit_scale=leaves[2], group=group,
        positive=positive.split(queries)[rank].to(device) if masked else None,
        passage_ids=None if ids is None else ids.split(passages)[rank].to(device),
        **own_options(option, queries, passages, rank, device), **options,
    )  # fmt: skip
    found = gradients(loss, leaves)
    distributed.all_reduce(found[3])
    found = [found[0], *(each / size for each in found[1:])]
    own = [expected[0], expected[1].split(queries)[rank], expected[2].split(passages)[rank], expected[3]]
    return [float((a - b).norm() / c.norm()) for a, b, c in zip(found, own, expected, strict=True)]


def check_differences_are_refused(size: int) -> None:
    query, passage = torch.ones(4, 6), torch.ones(4, 6)
    last = distributed.get_rank() == size - 1
    for named, options in (
        ("matryoshka differs", {"matryoshka": Matryoshka((2, 4 if last else 6))}),
        ("matryoshka differs", {"matryoshka": Matryoshka((2,)) if last else None}),
        ("teacher differs", {"teacher": Teacher(query, passage, 2.0 if last else 1.0)}),
        ("matryoshka.dims must be at most", {"matryoshka": Matryoshka((2, 9 if last else 6))}),
        ("teacher.query must have shape", {"teacher": Teacher(query[:3] if last else query, passage, 1.0)}),
    ):
        try:
            inf_cl_loss(query, passage, logit_scale=3.0, group=distributed.group.WORLD, **options)  # type: ignore[arg-type]
        except ValueError as error:
            assert named in str(error), (named, str(error))
        else:
            raise AssertionError(f"not refused: {named}")


def main(size: int, device: str) -> None:
    group: Any
    if device == "cuda":
        own_gpus = torch.cuda.device_count() >= size
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if own_gpus else 0)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if own_gpus else "gloo")
        group = distributed.group.WORLD if own_gpus else HostCommunication(distributed.group.WORLD)
        cases = [("triton", torch.bfloat16, 1e-2), ("triton", torch.float32, 5e-5)]
    else:
        distributed.init_process_group("gloo")
        group = distributed.group.WORLD
        cases = [("chunked", torch.float64, 1e-12), ("chunked", torch.float32, 1e-5)]
        if size == 3:
            cases.append(("triton", torch.float32, 1e-5))
    for (implementation, dtype, allowed), kind, exchange, symmetric, masked in itertools.product(
        cases, KINDS, ("ring", "gather"), (False, True), (False, True)
    ):
        if implementation == "triton" and symmetric == masked:
            # Half of the combinations: the interpreter is slow, and each compiles new kernels on a GPU.
            continue
        # A large scale has no safe constant shift.
        logit_scale = 300.0 if masked and dtype != torch.bfloat16 else 20.0
        found = errors(
            group, size, kind, dtype, masked, device, logit_scale, symmetric=symmetric, exchange=exchange,
            implementation=implementation, workspace_mib=2**-6,
        )  # fmt: skip
        assert max(found) <= allowed, (implementation, dtype, kind, exchange, symmetric, masked, found)
    if device == "cpu":
        check_differences_are_refused(size)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    main(int(sys.argv[1]), sys.argv[2])
