"""One rank of several: random options over a group follow their equations. Run by test_definitions.py."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from definitions import Case, defined, errors, found_by, random_case, with_gradients
from torch import Tensor, distributed

from losses import Guide, Positives, Ragged, Teacher, TeacherScores, sigmoid_loss


def of_rank(case: Case, queries: list[int], passages: list[int], rank: int) -> Case:
    """This rank's shard."""
    first, last = sum(queries[:rank]), sum(queries[: rank + 1])
    mine, ours = slice(first, last), slice(sum(passages[:rank]), sum(passages[: rank + 1]))
    arguments: dict[str, Any] = dict(case.arguments)

    def pairs(every: Tensor) -> Tensor:
        return every[(every[:, 0] >= first) & (every[:, 0] < last)] - torch.tensor([first, 0])

    def part(name: str, rows: slice) -> None:
        if arguments.get(name) is not None:
            arguments[name] = arguments[name][rows]

    part("positive", mine)
    part("query_ids", mine)
    part("passage_ids", ours)
    if "excluded" in arguments:
        arguments["excluded"] = pairs(arguments["excluded"])
    if (positives := arguments.get("positives")) is not None:
        arguments["positives"] = Positives(pairs(positives.pairs), positives.reduction)
    negatives, own = case.negatives, case.own
    if (guide := negatives.guide) is not None:
        negatives = replace(negatives, guide=Guide(guide.query[mine], guide.passage[ours], guide.margin))
    if negatives.frozen_excluded is not None:
        negatives = replace(negatives, frozen_excluded=pairs(negatives.frozen_excluded))
    if own is not None and negatives.own is not None:
        offsets = negatives.own.offsets[first : last + 1]
        own = own[offsets[0] : offsets[-1]]
        negatives = replace(negatives, own=Ragged(own, offsets - offsets[0]))
    arguments["negatives"] = negatives
    teacher = arguments.get("teacher")
    if isinstance(teacher, Teacher):
        arguments["teacher"] = replace(teacher, query=teacher.query[mine], passage=teacher.passage[ours])
    if isinstance(teacher, TeacherScores):
        offsets = teacher.offsets[first : last + 1]
        listed = slice(int(offsets[0]), int(offsets[-1]))
        arguments["teacher"] = replace(
            teacher, passages=teacher.passages[listed], offsets=offsets - offsets[0], scores=teacher.scores[listed]
        )
    return Case(case.query[mine], case.passage[ours], case.scale, arguments, own)


def sizes(rows: int, ranks: int, random_: random.Random) -> list[int]:
    """Rows of each rank, at random; some may have none."""
    cuts = sorted(random_.choices(range(rows + 1), k=ranks - 1))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, rows], strict=True)]


def check(seed: int, rank: int, ranks: int) -> None:
    case, random_ = random_case(seed, largest=13), random.Random(seed)
    queries, passages = (sizes(len(side), ranks, random_) for side in (case.query, case.passage))
    if case.arguments["positive"] is None:
        case = replace(case, arguments={**case.arguments, "positive": case.positive})
    truth, expected = defined(case)
    mine = slice(sum(queries[:rank]), sum(queries[: rank + 1]))
    own_rows = slice(0, 0)
    if case.negatives.own is not None:
        offsets = case.negatives.own.offsets
        own_rows = slice(int(offsets[mine.start]), int(offsets[mine.stop]))
    ours = slice(sum(passages[:rank]), sum(passages[: rank + 1]))
    parts = [truth[0], truth[1][mine], truth[2][ours], truth[3], *(each[own_rows] for each in truth[4:])]
    for exchange in ("ring", "gather"):
        how: dict[str, Any] = {"exchange": exchange, "implementation": "chunked", "workspace_mib": 0.005}
        found, statistics = found_by(of_rank(case, queries, passages, rank), group=distributed.group.WORLD, **how)
        distributed.all_reduce(found[3])
        found = [found[0], *(each / ranks for each in found[1:])]
        assert max(errors(found, parts, case)) <= 1e-10, (seed, exchange, errors(found, parts, case))
        for name, theirs in expected.items() if statistics is not None else ():
            values: Tensor = getattr(statistics, name).double()
            theirs = theirs[mine].double() if theirs.dim() else theirs.double()
            torch.testing.assert_close(values, theirs, rtol=1e-9, atol=1e-9, msg=f"{seed} {exchange} {name}")


def check_sigmoid(seed: int, rank: int, ranks: int) -> None:
    """The sigmoid loss with limits and guides over ranks is that of the whole matrix in one process."""
    random_ = random.Random(seed)
    case = random_case(seed, random_.choice([("limit",), ("guide",), ("limit", "guide")]), largest=13)
    queries, passages = (sizes(len(side), ranks, random_) for side in (case.query, case.passage))
    if case.arguments["positive"] is None:
        case = replace(case, arguments={**case.arguments, "positive": case.positive})

    def found_of(shard: Case, **how: Any) -> list[Tensor]:
        leaves = [*shard.leaves(), torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)]
        given = {name: value for name, value in shard.arguments.items() if name not in ("symmetric", "statistics")}
        loss = sigmoid_loss(*leaves[:2], logit_scale=leaves[2], logit_bias=leaves[3], **given, **how)
        return with_gradients(loss, leaves)

    truth = found_of(case, implementation="full")
    group = distributed.group.WORLD
    found = found_of(of_rank(case, queries, passages, rank), group=group, workspace_mib=0.005)
    mine = slice(sum(queries[:rank]), sum(queries[: rank + 1]))
    ours = slice(sum(passages[:rank]), sum(passages[: rank + 1]))
    for each in found[3:]:
        distributed.all_reduce(each)
    found = [found[0], *(each / ranks for each in found[1:])]
    for one, other in zip(found, [truth[0], truth[1][mine], truth[2][ours], *truth[3:]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=f"sigmoid {seed}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for number in range(40):
        check(number, distributed.get_rank(), distributed.get_world_size())
        check_sigmoid(number, distributed.get_rank(), distributed.get_world_size())
    distributed.barrier()
    distributed.destroy_process_group()
