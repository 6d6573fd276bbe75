"""Choice of the backend that computes one rank's queries against a block of passages."""

from __future__ import annotations

from losses.distributed.blocks import BlockBackend
from losses.distributed.objectives.teacher_scores import NoScoresBackend, TeacherScoresBackend
from losses.distributed.objectives.torch_matryoshka import TorchMatryoshkaBackend
from losses.distributed.objectives.torch_teacher import TorchTeacherBackend
from losses.distributed.objectives.triton_matryoshka import TritonMatryoshkaBackend
from losses.distributed.objectives.triton_teacher import TritonTeacherBackend
from losses.distributed.torch_blocks import TorchBackend
from losses.distributed.triton_blocks import TritonBackend
from losses.inputs import ContrastiveBatch
from losses.option_checks.objective import Objective
from losses.options import Teacher
from losses.precision import Precision


def backend_of(
    batch: ContrastiveBatch,
    objective: Objective,
    precision: Precision,
    workspace_bytes: int,
    first_passage: int,
    fused: bool,
) -> BlockBackend:
    """The backend for the options of `objective`: Triton kernels if `fused`, otherwise tiles in PyTorch."""
    common = (batch, precision, workspace_bytes, first_passage)
    if objective.prefixes is not None:
        matryoshka = TritonMatryoshkaBackend if fused else TorchMatryoshkaBackend
        return matryoshka(*common, objective.prefixes)
    if isinstance(objective.teacher, Teacher):
        distilled = TritonTeacherBackend if fused else TorchTeacherBackend
        return distilled(*common, objective.teacher)
    if objective.lists_alone:
        plain: BlockBackend = NoScoresBackend(*common)
    else:
        plain = TritonBackend(*common) if fused else TorchBackend(*common)
    if objective.teacher is not None:
        return TeacherScoresBackend(plain, batch, precision, objective.teacher)
    return plain
