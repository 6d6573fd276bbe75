"""Fast inner products, with a bound on how far they lie from the exact scores.

The bounds hold whatever the order of summation. For half precision they use the norms of what rounding the vectors
took from them, measured, rather than its worst case, which would be three times as wide.
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

ROUND32 = 2.0**-24
# Tensor cores cut the sum of a few products off instead of rounding it: twice 2^-23 an addition (Fasi, Higham,
# Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021).
ROUND_HALF_SUM = 2.0**-22
# A processor returns products in bfloat16, rounded to 8 bits.
ROUND_BFLOAT16 = 2.0**-8
# What numbers too small for float32, or flushed to zero, may take from a product, for each dimension and unit of norm.
FLUSHED = 2.0**-120
# Numbers that are looked at together: on a processor, what its cache holds.
MEASURED_AT_ONCE = {"cpu": 2**19, "cuda": 2**62}
# Rows of a block that a processor multiplies at once: the product is compared while its cache still holds it.
SLICE_ROWS = {"cpu": 2048}


def half_type(device: torch.device) -> torch.dtype | None:
    """The half-precision type that the device multiplies faster than float32; none when there is none."""
    if device.type == "cuda":
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else None
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    known = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if known and _multiplies_faster(torch.bfloat16) else None


@functools.cache
def _multiplies_faster(half: torch.dtype) -> bool:
    """Whether this processor is quicker in `half` than in float32, tried for some milliseconds.

    That it knows bfloat16 does not say so: without AMX some take twice as long as in float32, others half.
    """
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], half: []}
    threads = torch.get_num_threads()
    # Threads that wait for each other would be measured instead.
    torch.set_num_threads(1)
    try:
        for _ in range(6):
            # In turns, so that other work on the machine disturbs both alike; the first turn warms up.
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
    """Products [Q, n] float32, each within `absolute` [Q, 1] plus `relative` times its magnitude of the score."""

    products: torch.Tensor
    absolute: torch.Tensor
    relative: float

    def lower(self, products: torch.Tensor, absolute: torch.Tensor) -> torch.Tensor:
        """No score is below this, for some of the products and the errors of their queries."""
        return products - absolute - self.relative * products.abs()

    def upper(self, products: torch.Tensor, absolute: torch.Tensor) -> torch.Tensor:
        """No score is above this."""
        return products + absolute + self.relative * products.abs()

    def least(self, floor: torch.Tensor) -> torch.Tensor:
        """[Q, 1]: products below this have scores below `floor` [Q, 1]."""
        reach = floor - self.absolute
        return reach * torch.where(reach > 0, 1 - 2 * self.relative, 1 + 2 * self.relative)


class Queries:
    """Queries [Q, D], finite, with what the products with them need."""

    def __init__(self, vectors: torch.Tensor, half: torch.dtype | None) -> None:
        self.vectors = vectors
        self.norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
        self.half = None if half is None else vectors.to(half)
        if self.half is not None and not bool(self.half.isfinite().all()):
            self.half = None
        if self.half is not None:
            self.lost = torch.linalg.vector_norm(vectors - self.half, dim=1, dtype=torch.float64)

    def multiply(self, block: Block, which: torch.Tensor | None, in_half: bool) -> Approximation:
        """Products of the queries `which` (int64; none for all) with a block, and their errors."""
        take = (lambda tensor: tensor) if which is None else (lambda tensor: tensor[which])
        norms, dimension = take(self.norms), self.vectors.shape[1]
        # What rounding the scores themselves and flushing small numbers may add.
        beside = 4 * ROUND32 * norms * block.norm + dimension * FLUSHED * (norms + block.norm + 1)
        if not in_half:
            errors = 1.01 * dimension * ROUND32 * norms * block.norm + beside
            return Approximation(take(self.vectors) @ block.full.T, errors.float()[:, None], 0.0)
        assert self.half is not None and block.half is not None
        lost, whole = take(self.lost), block.norm + block.lost
        errors = lost * whole + norms * block.lost + dimension * ROUND_HALF_SUM * (norms + lost) * whole + beside
        left = take(self.half)
        if left.is_cuda:
            products, relative = torch.mm(left, block.half.T, out_dtype=torch.float32), 0.0
        elif left.dtype == torch.bfloat16:
            products, relative = (left @ block.half.T).float(), 1.01 * ROUND_BFLOAT16
        else:  # a processor has no fast float16: this is the arithmetic of a GPU, for tests
            products, relative = left.float() @ block.half.float().T, 0.0
        # A little more, for the rounding of these errors and of the comparisons with them.
        return Approximation(products, 1.01 * errors.float()[:, None], relative)

    def sum_errors(self, largest_norm: float) -> torch.Tensor:
        """As `index.exact.search.scores.sum_errors`, for these queries: float64 [Q]."""
        return sum_errors(self.norms, largest_norm, self.vectors.shape[1])


@dataclass(frozen=True)
class Block:
    """Passages [n, D] that were measured together. Made by `measured`."""

    vectors: torch.Tensor
    half: torch.Tensor | None
    """The same in half precision, where that is faster and holds them."""
    first: int
    """The row of the first one."""
    start: int
    """Where the block begins in its window."""
    ids: Sequence[str]
    """Of all rows."""
    norm: float
    """At least the largest norm."""
    lost: float
    """At least the largest norm of what rounding to half precision took."""
    largest: float
    """The largest magnitude of a number."""

    @classmethod
    def measured(
        cls, vectors: torch.Tensor, first: int, start: int, ids: Sequence[str], half: torch.dtype | None
    ) -> Block:
        """A block of `vectors` [n, D], checked to be finite.

        Raises:
            InputError: a passage holds NaN or infinity; the message names its row and id.
        """
        is_half = vectors.dtype == half
        rounded = vectors if is_half else None if half is None else torch.empty_like(vectors, dtype=half)
        low = high = norm = lost = 0.0
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
            low, high, norm, lost = min(low, least), max(high, most), max(norm, length), max(lost, *taken, 0.0)
        magnitude, dimension = max(abs(low), abs(high)), vectors.shape[1]
        # The norms themselves were summed in float32, in which the squares of small numbers vanish.
        norm = min(_widened(norm, dimension), magnitude * dimension**0.5)
        lost = 0.0 if rounded is None or is_half else _widened(lost, dimension)
        return cls(vectors, rounded if lost < float("inf") else None, first, start, ids, norm, lost, magnitude)

    def slices(self) -> list[Block]:
        """The block in pieces whose products stay in a processor's cache; whole on a GPU."""
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
    def places(self) -> torch.Tensor:
        """[n] int64: the place of each row's id among those of the block, the highest id highest."""
        names = self.ids[self.first : self.first + len(self.vectors)]
        # Python compares text by code points, which is the order of its UTF-8 bytes.
        ascending = torch.tensor(sorted(range(len(names)), key=names.__getitem__))
        places = torch.empty_like(ascending)
        places[ascending] = torch.arange(len(names))
        return places.to(self.vectors.device)


def _largest_norm(vectors: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(vectors.float(), dim=1).max()


def _widened(norm: float, dimension: int) -> float:
    return norm * (1 + 2 * dimension * ROUND32) + dimension**0.5 * 2.0**-62


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Plain float32 products and sums, even where the caller trains with TF32, autocast or float16 sums."""
    # These can be read and restored whether the caller set the precision here or by one of the older functions.
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
