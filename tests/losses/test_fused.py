"""Properties of the kernels: blocks, kept exponentials, determinism, operators.

Without a GPU they run under Triton's interpreter.
"""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from losses import inf_cl_loss
from losses.inputs import ContrastiveBatch
from losses.triton import inf_cl as triton_inf_cl
from losses.triton import shapes
from losses.triton.block_sizes import choose_blocks, forward_blocks, gradient_blocks
from losses.triton.dense import dense_loss
from losses.triton.inf_cl import fused_loss
from losses.triton.launch import (
    MIN_CAPABILITY_DENSE,
    MIN_CAPABILITY_FUSED,
    compact_ids,
    interpreted,
    warn_fallback,
    why_not_fused,
    why_not_on,
)
from losses.triton.sigmoid import fused_sigmoid_loss

pytest.importorskip("triton")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="kernels run on the GPU instead")
DEVICES = [
    pytest.param("cpu", marks=needs_interpreter),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
MIB = 2**20


def embeddings(queries: int, passages: int, dims: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """float64 unit vectors; passage i is slightly similar to query i."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, dims, dtype=torch.float64, generator=generator)
    passage = torch.randn(passages, dims, dtype=torch.float64, generator=generator)
    passage[:queries] += 0.1 * query[:passages]
    return normalize(query, dim=1).to(device), normalize(passage, dim=1).to(device)


def step(query: Tensor, passage: Tensor, logit_scale: float, **options: Any) -> tuple[Tensor, ...]:
    """Loss and gradients of query, passage and logit_scale."""
    query, passage = (side.detach().requires_grad_() for side in (query, passage))
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = torch.tensor(logit_scale, dtype=dtype, device=query.device, requires_grad=True)
    loss = inf_cl_loss(query, passage, logit_scale=scale, **options)
    return loss.detach(), *torch.autograd.grad(loss, (query, passage, scale))


def errors(
    query: Tensor,
    passage: Tensor,
    logit_scale: float,
    dtype: torch.dtype,
    implementation: str = "triton",
    **options: Any,
) -> list[float]:
    """Relative errors of loss and gradients against float64, on embeddings rounded to `dtype`."""
    query, passage = query.to(dtype), passage.to(dtype)
    same = {name: value for name, value in options.items() if name not in ("precision", "workspace_mib")}
    truth = step(query.double(), passage.double(), logit_scale, implementation="full", **same)
    found = step(query, passage, logit_scale, implementation=implementation, **options)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workspace_mib", [0.1, 64.0])  # recomputed, kept
@pytest.mark.parametrize("logit_scale", [20.0, 500.0])  # one shift, running maxima
def test_kept_exponentials_give_the_gradients_of_recomputed_ones(
    logit_scale: float, workspace_mib: float, device: str
) -> None:
    query, passage = embeddings(131, 157, 40, device)
    ids = torch.arange(157, device=device) % 50
    loss, *gradients = errors(
        query, passage, logit_scale, torch.bfloat16, symmetric=True, passage_ids=ids, workspace_mib=workspace_mib
    )
    assert loss <= 1e-4
    # bf16 gradients alone have errors of 2^-9; blocks of dS and kept exponentials add theirs.
    assert max(gradients) <= 5e-3


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_deterministic(device: str) -> None:
    query, passage = (side.float() for side in embeddings(97, 130, 24, device))
    positive = torch.randint(130, (97,), generator=torch.Generator().manual_seed(1)).to(device)
    options: dict[str, Any] = {
        "symmetric": True,
        "positive": positive,
        "implementation": "triton",
        "workspace_mib": 0.1,
    }
    first = step(query, passage, 30.0, **options)
    for _ in range(3):
        for again, before in zip(step(query, passage, 30.0, **options), first, strict=True):
            assert torch.equal(again, before)


@pytest.mark.parametrize("device", DEVICES)
def test_columns_cut_by_the_workspace_cover_every_passage(device: str) -> None:
    query, passage = (side.float() for side in embeddings(300, 700, 8, device))
    whole = step(query, passage, 10.0, symmetric=True, implementation="triton", workspace_mib=64)
    cut = step(query, passage, 10.0, symmetric=True, implementation="triton", workspace_mib=0.05)
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@needs_interpreter
def test_no_uninitialized_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fill new memory with NaN, so that reading it before writing shows.
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args: Any, original: Any = original, **options: Any) -> Tensor:
            made = original(*args, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poisoned)
    new_empty = Tensor.new_empty

    def poisoned_method(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = new_empty(self, *size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned_method)
    query, passage = (side.float() for side in embeddings(37, 53, 9, "cpu"))
    for logit_scale, implementation in itertools.product((10.0, 1e4), ("triton", "dense")):
        found = step(query, passage, logit_scale, symmetric=True, implementation=implementation, workspace_mib=0.05)
        assert all(each.isfinite().all() for each in found)


@needs_interpreter
@pytest.mark.filterwarnings("ignore")
def test_operators_under_torch_compile_equal_eager() -> None:
    def loss(query: Tensor, passage: Tensor) -> Tensor:
        return inf_cl_loss(query, passage, logit_scale=7.0, symmetric=True, implementation="triton") * 2

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    # From the second size on, the compiler treats sizes as symbols.
    for queries, passages in ((19, 23), (23, 31), (12, 40)):
        query, passage = (side.float().requires_grad_() for side in embeddings(queries, passages, 8, "cpu"))
        plain = torch.autograd.grad(loss(query, passage), (query, passage))
        found = torch.autograd.grad(compiled(query, passage), (query, passage))
        for one, other in zip(plain, found, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wrong", [9, -1, 10**6, 2**32 + 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_an_out_of_range_positive_gives_nan(wrong: int, symmetric: bool, device: str) -> None:
    query, passage = (side.float() for side in embeddings(5, 9, 8, device))
    positive, scale, bias = (torch.tensor(each, device=device) for each in ([0, 1, wrong, 3, 4], 5.0, -1.0))
    batch = ContrastiveBatch(query, passage, scale, positive, None, None, symmetric)
    assert fused_loss(batch, "fp32", MIB).isnan() and dense_loss(batch, "fp32").isnan()
    assert fused_sigmoid_loss(batch, bias, "fp32", MIB).isnan()
    # Backward reads nothing out of range either.
    leaf = replace(batch, query=query.requires_grad_())
    for loss in (fused_loss(leaf, "fp32", MIB), dense_loss(leaf, "fp32"), fused_sigmoid_loss(leaf, bias, "fp32", MIB)):
        (gradient,) = torch.autograd.grad(loss, query)
        assert gradient.shape == query.shape


@needs_interpreter
def test_exponentials_are_kept_only_if_backward_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    query, passage = (side.bfloat16().requires_grad_() for side in embeddings(5, 9, 8, "cpu"))
    asked = []
    real = triton_inf_cl.inf_cl_forward

    def watched(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(triton_inf_cl, "inf_cl_forward", watched)
    inf_cl_loss(query, passage, logit_scale=5.0, implementation="triton")
    inf_cl_loss(query.detach(), passage.detach(), logit_scale=5.0, implementation="triton")
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            inf_cl_loss(query, passage, logit_scale=5.0, implementation="triton")
    assert asked == [True, False, False, False]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workspace_mib", [0.1, 64.0])  # recomputed, kept
def test_a_second_backward_gives_the_same(workspace_mib: float, device: str) -> None:
    query, passage = (side.bfloat16().requires_grad_() for side in embeddings(150, 170, 24, device))
    options: dict[str, Any] = {"symmetric": True, "implementation": "triton", "workspace_mib": workspace_mib}
    loss = inf_cl_loss(query, passage, logit_scale=9.0, **options)
    first = torch.autograd.grad(loss, (query, passage), retain_graph=True)
    second = torch.autograd.grad(loss, (query, passage))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=4e-3 * float(one.float().norm()))


def test_blocks_cover_the_matrix_within_the_workspace() -> None:
    for queries, passages in ((1, 1), (129, 70), (65536, 65536), (1 << 20, 1 << 20), (3, 100_000)):
        for mib in (1, 64, 256, 9500):
            blocks = choose_blocks(queries, passages, 768, 2, mib * MIB, 132, True)
            assert 1 <= blocks.rows <= queries and 1 <= blocks.columns <= passages
            assert blocks.rows * blocks.columns * 2 <= max(mib * MIB, 2**15)
            assert max(blocks.rows, blocks.columns) <= 2**16
            assert blocks.kept_rows in (0, queries) or blocks.kept_rows % blocks.rows == 0
            assert blocks.kept_rows * passages * 2 <= mib * MIB
            visited = [
                (rows, each) for rows, columns, _ in gradient_blocks(queries, passages, blocks) for each in columns
            ]
            assert sum((r.stop - r.start) * (c.stop - c.start) for r, c in visited) == queries * passages
            entries = 0
            for rows, columns, kept in forward_blocks(queries, passages, blocks.kept_rows, mib * MIB, 128, 128, 0.125):
                entries += (rows.stop - rows.start) * (columns.stop - columns.start)
                assert kept == (rows.start < blocks.kept_rows)
            assert entries == queries * passages


def test_a_larger_workspace_keeps_more_exponentials() -> None:
    kept = [choose_blocks(65536, 65536, 768, 2, mib * MIB, 132, True).kept_rows for mib in (256, 2048, 4096, 9500)]
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == 65536


def test_without_kept_exponentials_blocks_use_the_workspace() -> None:
    blocks = [choose_blocks(65536, 65536, 768, 2, mib * MIB, 132, False) for mib in (256, 1024, 9500)]
    sizes = [each.rows * each.columns for each in blocks]
    assert sizes == sorted(sizes) and sizes[0] <= 128 * MIB and sizes[-1] == 65536**2
    assert not any(each.kept_rows for each in blocks)


def test_compact_ids_are_equal_where_ids_are() -> None:
    passage_ids = torch.tensor([2**62, -5, 2**62, 7, 2**62 + 1])
    query_ids = torch.tensor([7, 8, 2**62])
    of_query, of_passage = compact_ids(query_ids, passage_ids)
    assert torch.equal(of_query[:, None] == of_passage, query_ids[:, None] == passage_ids)
    assert of_query[1] == -1


@pytest.mark.parametrize("implementation", ["triton", "dense"])
def test_kernels_fall_back_to_tiles_with_one_warning(implementation: Any) -> None:
    query, passage = embeddings(5, 5, 4, "cpu")
    warn_fallback.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = inf_cl_loss(query, passage, logit_scale=3.0, implementation=implementation)
    torch.testing.assert_close(found, inf_cl_loss(query, passage, logit_scale=3.0, implementation="full"))
    assert "float64" in str(why_not_fused(query))
    said = [str(warning.message) for warning in caught]
    assert [f"implementation {implementation!r} falls back to 'chunked'" in each for each in said] == [True]


def test_the_reason_names_the_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.version, "hip", None)
    reasons = [
        why_not_on.__wrapped__(torch.device("cuda"), False, min_capability)
        for min_capability in (MIN_CAPABILITY_FUSED, MIN_CAPABILITY_DENSE)
    ]
    assert reasons == ["it needs a GPU of compute capability 9.0 or newer, found 8.6", None]


def test_a_table_of_shapes_named_by_the_environment_takes_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")

    def found(dim: int) -> shapes.TileShape:
        return shapes.tile_shape("sums", dim, torch.bfloat16, "ieee", torch.device("cuda"))

    ours, made = found(768), replace(shapes.DEFAULT_HALF, stages=2)
    shapes.write_shapes(
        table := tmp_path / "own.json",
        [shapes.table_row("NVIDIA H200", "sums", "bfloat16", dim, replace(made, group=dim)) for dim in (128, 1024)],
    )
    monkeypatch.setenv(shapes.VARIABLE, str(table))
    assert [found(dim) for dim in (64, 900)] == [replace(made, group=dim) for dim in (128, 1024)]
    monkeypatch.delenv(shapes.VARIABLE)
    assert found(768) == ours != made


def test_a_damaged_table_of_shapes_is_refused_by_name(tmp_path: Path) -> None:
    row = shapes.table_row("GPU", "sums", "bfloat16", 768, shapes.DEFAULT_HALF)
    good = tmp_path / "good.json"
    shapes.write_shapes(good, [row])
    assert shapes.read_shapes(good) == [row]
    for number, broken in enumerate(({**row, "warps": "4"}, {**row, "kernel": "x"}, {"device": "GPU"})):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps([broken]), encoding="utf-8")
        with pytest.raises(ValueError, match=path.name):
            shapes.read_shapes(path)


def test_the_committed_table_of_shapes_is_valid() -> None:
    assert shapes.read_shapes(shapes.TABLE)


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision", "gradient", "value"),
    [
        (torch.bfloat16, "bf16", 4e-3, 1e-4),
        (torch.float16, "auto", 1e-3, 1e-5),
        (torch.float32, "tf32", 5e-4, 1e-4),
        (torch.float32, "fp32", 5e-6, 1e-6),
    ],
)
@pytest.mark.parametrize("implementation", ["triton", "dense"])
def test_errors_against_float64_on_the_gpu(
    dtype: torch.dtype, precision: Any, gradient: float, value: float, symmetric: bool, implementation: str
) -> None:
    for queries, passages, dims in ((1, 1, 1), (257, 263, 65), (1024, 1536, 768), (515, 515, 1152)):
        query, passage = embeddings(queries, passages, dims, "cuda")
        if precision in ("tf32",):
            bits = query.float().view(torch.int32), passage.float().view(torch.int32)
            query, passage = ((each + 0x1000 & ~0x1FFF).view(torch.float32).double() for each in bits)
        loss, *gradients = errors(query, passage, 50.0, dtype, implementation, precision=precision, symmetric=symmetric)
        if passages > 1:
            assert loss <= value
            assert max(gradients[:2]) <= gradient


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [64, 128, 384, 512, 640, 768, 1024, 1152, 4096])
def test_embedding_dimensions_on_the_gpu(dims: int) -> None:
    loss, query, passage, _ = errors(*embeddings(700, 900, dims, "cuda"), 50.0, torch.bfloat16, symmetric=True)
    assert loss <= 1e-4 and max(query, passage) <= 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "dense"])
def test_a_captured_cuda_graph_replays_on_new_inputs(implementation: Any) -> None:
    query, passage = (side.bfloat16().requires_grad_() for side in embeddings(512, 512, 64, "cuda"))
    scale = torch.tensor(30.0, device="cuda", requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        loss = inf_cl_loss(query, passage, logit_scale=scale, symmetric=True, implementation=implementation)
        return loss.detach(), *torch.autograd.grad(loss, (query, passage, scale))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    fresh = embeddings(512, 512, 64, "cuda", seed=5)
    with torch.no_grad():
        query.copy_(fresh[0])
        passage.copy_(fresh[1])
    graph.replay()
    for one, other in zip(captured, run(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_step_does_not_synchronize() -> None:
    query, passage = (side.bfloat16() for side in embeddings(600, 600, 64, "cuda"))
    options: dict[str, Any] = {"symmetric": True, "passage_ids": torch.arange(600, device="cuda") // 2}
    scale = torch.tensor(30.0, device="cuda", requires_grad=True)
    for implementation in ("triton", "dense"):
        for _ in range(2):
            leaves = [side.detach().requires_grad_() for side in (query, passage)]
            torch.cuda.set_sync_debug_mode("error")
            try:
                loss = inf_cl_loss(*leaves, logit_scale=scale, implementation=implementation, **options)
                torch.autograd.grad(loss, (*leaves, scale))
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    # 3,000,000 rows of 768 values: the last rows begin beyond 2^31 elements.
    rows, dims = 3_000_000, 768
    passage = torch.zeros(rows, dims, dtype=torch.bfloat16, device="cuda")
    query, own = (side.bfloat16() for side in embeddings(8, 8, dims, "cuda"))
    passage[-8:] = own
    positive = torch.arange(rows - 8, rows, device="cuda")
    query.requires_grad_()
    found = inf_cl_loss(query, passage, logit_scale=50.0, positive=positive, implementation="triton")
    scores = 50.0 * query.detach().double() @ own.double().T
    total = scores.exp().sum(1) + (rows - 8)
    expected = (total.log() - scores.diagonal()).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(found, query)
    share = scores.exp() / total[:, None]
    wanted = 50.0 / 8 * (share - torch.eye(8, device="cuda")) @ own.double()
    assert float((gradient.double() - wanted).norm() / wanted.norm()) <= 4e-3
