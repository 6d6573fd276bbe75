"""Fast inner products, with bounds on their distance from the exact scores.

The bounds hold for any order of summation. For half precision they use the measured norms of the rounding errors of the
vectors; worst-case bounds would be three times wider.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from index.exact.scores import sum_errors
from index.files import InputError
from index.ties import id_ranks

ROUND32 = 2.0**-24
# Tensor cores truncate the sum of a few products: an error of up to 2 * 2^-23 per addition (Fasi, Higham, Mikaitis,
# Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021).
ROUND_HALF_SUM = 2.0**-22
# A CPU returns bfloat16 products rounded to 8 bits.
ROUND_BFLOAT16 = 2.0**-8
# Error by underflow or flushing to zero, per dimension and unit of norm.
FLUSHED = 2.0**-120
# Numbers processed at once by `Block.measured`; on a CPU, as many as fit into the cache.
MEASURED_AT_ONCE = {"cpu": 2**19, "cuda": 2**62}
# Rows of a block that a CPU multiplies at once, so that the product is compared while it is in the cache.
SLICE_ROWS = {"cpu": 2048}


def half_type(device: torch.device) -> torch.dtype | None:
    """The half-precision dtype that the device multiplies faster than float32; None if there is none."""
    if device.type == "cuda":
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else None
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    known = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if known and _multiplies_faster(torch.bfloat16) else None


@functools.cache
def _multiplies_faster(half: torch.dtype) -> bool:
    """Whether this CPU multiplies faster in `half` than in float32, timed for some milliseconds.

    Support for bfloat16 does not imply this: without AMX some CPUs take twice as long as in float32, others half.
    """
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], half: []}
    threads = torch.get_num_threads()
    # With several threads, synchronization would be timed instead.
    torch.set_num_threads(1)
    try:
        for _ in range(6):
            # In turns, so that other load affects both alike; the first round warms up.
            for dtype, times in seconds.items():
                left, right = torch.zeros(64, 384, dtype=dtype), torch.zeros(512, 384, dtype=dtype)
                began = time.perf_counter()
                (left @ right.T).float()
                times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return min(seconds[half][1:]) < min(seconds[torch.float32][1:])


@dataclass(frozen=True)
class Approximation:
    """Approximate products [Q, n] float32 with error bounds.

    Each score is within `absolute` [Q, 1] + `relative` * |product| of its product.
    """

    products: torch.Tensor
    absolute: torch.Tensor
    relative: float

    def lower(self, products: torch.Tensor, absolute: torch.Tensor) -> torch.Tensor:
        """Lower bounds of the scores of some products, with the absolute errors of their queries."""
        return products - absolute - self.relative * products.abs()

    def upper(self, products: torch.Tensor, absolute: torch.Tensor) -> torch.Tensor:
        """Upper bounds of the scores."""
        return products + absolute + self.relative * products.abs()

    def product_threshold(self, floor: torch.Tensor) -> torch.Tensor:
        """[Q, 1]: products below this have scores below `floor` [Q, 1]."""
        reach = floor - self.absolute
        return reach * torch.where(reach > 0, 1 - 2 * self.relative, 1 + 2 * self.relative)


class Queries:
    """Finite queries [Q, D], with their norms and half-precision copies."""

    def __init__(self, vectors: torch.Tensor, half: torch.dtype | None) -> None:
        self.vectors = vectors
        self.norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
        self.half = None if half is None else vectors.to(half)
        if self.half is not None and not bool(self.half.isfinite().all()):
            self.half = None
        if self.half is not None:
            self.rounding_norm = torch.linalg.vector_norm(vectors - self.half, dim=1, dtype=torch.float64)

    def multiply(self, block: Block, which: torch.Tensor | None, use_half: bool) -> Approximation:
        """Products of the queries `which` (int64; None: all) with a block, and their error bounds."""
        take = (lambda tensor: tensor) if which is None else (lambda tensor: tensor[which])
        norms, dimension = take(self.norms), self.vectors.shape[1]
        # Rounding of the scores themselves, and underflow of small numbers.
        extra = 4 * ROUND32 * norms * block.norm + dimension * FLUSHED * (norms + block.norm + 1)
        if not use_half:
            errors = 1.01 * dimension * ROUND32 * norms * block.norm + extra
            return Approximation(take(self.vectors) @ block.full.T, errors.float()[:, None], 0.0)
        assert self.half is not None and block.half is not None
        rounding_norm, whole = take(self.rounding_norm), block.norm + block.rounding_norm
        errors = (
            rounding_norm * whole
            + norms * block.rounding_norm
            + dimension * ROUND_HALF_SUM * (norms + rounding_norm) * whole
            + extra
        )
        left = take(self.half)
        if left.is_cuda:
            products, relative = torch.mm(left, block.half.T, out_dtype=torch.float32), 0.0
        elif left.dtype == torch.bfloat16:
            products, relative = (left @ block.half.T).float(), 1.01 * ROUND_BFLOAT16
        else:  # emulates float16 on a GPU, for tests
            products, relative = left.float() @ block.half.float().T, 0.0
        # 1 % more for the rounding of the bounds themselves and of comparisons with them.
        return Approximation(products, 1.01 * errors.float()[:, None], relative)

    def sum_errors(self, largest_norm: float) -> torch.Tensor:
        """`index.exact.scores.sum_errors` of these queries: float64 [Q]."""
        return sum_errors(self.norms, largest_norm, self.vectors.shape[1])


@dataclass(frozen=True)
class Block:
    """Passages [n, D] with their norms. Created by `Block.measured`."""

    vectors: torch.Tensor
    half: torch.Tensor | None
    """The vectors in half precision; None if that is not faster or overflows."""
    first: int
    """Row of the first passage."""
    start: int
    """Position of the block in its window."""
    ids: Sequence[str]
    """Ids of all rows, not of the block only."""
    norm: float
    """Upper bound of the norms."""
    rounding_norm: float
    """Upper bound of the norms of the errors of rounding to half precision."""
    largest: float
    """Largest absolute value."""

    @classmethod
    def measured(
        cls, vectors: torch.Tensor, first: int, start: int, ids: Sequence[str], half: torch.dtype | None
    ) -> Block:
        """Create a block of `vectors` [n, D] and check that they are finite.

        Raises:
            InputError: a passage contains NaN or infinity; the message names its row and id.
        """
        is_half = vectors.dtype == half
        rounded = vectors if is_half else None if half is None else torch.empty_like(vectors, dtype=half)
        low = high = norm = rounding_norm = 0.0
        step = max(1, MEASURED_AT_ONCE[vectors.device.type] // max(1, vectors.shape[1]))
        for begin in range(0, len(vectors) if vectors.numel() else 0, step):
            some = vectors[begin : begin + step]
            smallest, largest = torch.aminmax(some)
            measures = [smallest.float(), largest.float(), _largest_norm(some)]
            if rounded is not None and not is_half:
                measures.append(_largest_norm(some - rounded[begin : begin + step].copy_(some)))
            least, most, length, *taken = torch.stack(measures).tolist()
            if not max(abs(least), abs(most)) < float("inf"):
                row = first + begin + int(some.isfinite().all(dim=1).int().argmin())
                raise InputError(f"row {row}, passage {ids[row]!r}: expected a finite vector, found NaN or infinity")
            low, high, norm, rounding_norm = (
                min(low, least),
                max(high, most),
                max(norm, length),
                max(rounding_norm, *taken, 0.0),
            )
        magnitude, dimension = max(abs(low), abs(high)), vectors.shape[1]
        # The norms were computed in float32, where squares of small numbers underflow.
        norm = min(_norm_upper_bound(norm, dimension), magnitude * dimension**0.5)
        rounding_norm = 0.0 if rounded is None or is_half else _norm_upper_bound(rounding_norm, dimension)
        return cls(
            vectors,
            rounded if rounding_norm < float("inf") else None,
            first,
            start,
            ids,
            norm,
            rounding_norm,
            magnitude,
        )

    def slices(self) -> list[Block]:
        """Split the block so that the products of a slice stay in the cache of a CPU; a GPU uses it whole."""
        step = SLICE_ROWS.get(self.vectors.device.type, len(self.vectors))
        if len(self.vectors) <= step:
            return [self]
        return [
            replace(
                self,
                vectors=self.vectors[begin : begin + step],
                half=None if self.half is None else self.half[begin : begin + step],
                first=self.first + begin,
                start=self.start + begin,
            )
            for begin in range(0, len(self.vectors), step)
        ]

    @functools.cached_property
    def full(self) -> torch.Tensor:
        """The vectors in float32."""
        return self.vectors.float()

    @functools.cached_property
    def id_ranks(self) -> torch.Tensor:
        """[n] int64: the rank of each row's id among those of the block; the highest id has the highest rank."""
        names = self.ids[self.first : self.first + len(self.vectors)]
        return torch.from_numpy(id_ranks(names)).to(self.vectors.device)


def _largest_norm(vectors: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(vectors.float(), dim=1).max()


def _norm_upper_bound(norm: float, dimension: int) -> float:
    return norm * (1 + 2 * dimension * ROUND32) + dimension**0.5 * 2.0**-62


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 products and sums in float32, whatever the caller set (TF32, autocast, float16 sums)."""
    # These settings can be restored however the caller set them, by old or new functions.
    modules: Any = torch.backends  # torch makes some of these names at run time
    settings = [
        (modules.cuda.matmul, "fp32_precision", "ieee"),
        (modules.mkldnn.matmul, "fp32_precision", "ieee"),
        (modules.cuda.matmul, "allow_fp16_accumulation", False),
    ]
    before = [getattr(backend, name) for backend, name, _ in settings]
    try:
        for backend, name, value in settings:
            setattr(backend, name, value)
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for (backend, name, _), value in zip(settings, before, strict=True):
            setattr(backend, name, value)
