"""Tile shapes: BLOCK_M, BLOCK_N, BLOCK_K, warps and stages of each kernel.

The table shapes.json holds the fastest shapes on the devices it names; `python -m losses.autotune` measures a device
and writes such a table. The environment variable DENSE_RETRIEVER_SHAPES names a table that takes precedence. Nothing
is tuned during training.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("shapes.json")
VARIABLE = "DENSE_RETRIEVER_SHAPES"
KERNELS = ("sums", "kept_sums", "gradient", "kept_gradient", "sigmoid")
# Kernels of the options `matryoshka` and `teacher`, which `losses.autotune` does not measure.
OPTION_KERNELS = ("prefix_sums", "prefix_gradient", "prefix_products", "teacher_sums", "teacher_gradient")


@dataclass(frozen=True)
class TileShape:
    """Launch parameters of a tile kernel. Triton's interpreter ignores warps and stages."""

    block_m: int
    """Queries per tile; a power of two."""
    block_n: int
    """Passages per tile; a power of two."""
    block_k: int
    """Dimensions per step of the product; a power of two."""
    warps: int
    stages: int
    """Pipeline stages: steps of the product whose operands are loaded in advance."""
    group: int
    """Rows of tiles that are computed together, to share operands in the L2 cache."""
    persistent: int = 0
    """1: persistent programs, each with many tiles, that prefetch across tiles; 0: one program per tile."""

    def grid(self, rows: int, columns: int, processors: int) -> tuple[int]:
        """Number of programs for a block of [rows, columns] scores."""
        tiles = -(-rows // self.block_m) * -(-columns // self.block_n)
        resident = processors * (2 if self.block_m * self.block_n <= 128 * 128 else 1)
        return (min(tiles, resident) if self.persistent else tiles,)

    def meta(self) -> dict[str, Any]:
        """Keyword arguments of the kernel launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP": self.group,
            "PERSISTENT": self.persistent,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


DEFAULT_HALF = TileShape(128, 128, 64, warps=4, stages=3, group=8)
DEFAULT_FLOAT32 = TileShape(128, 128, 32, warps=8, stages=3, group=8)
# Kept exponentials are only read and written: many small programs hide the memory latency.
DEFAULT_KEPT_GRADIENT = TileShape(64, 128, 64, warps=4, stages=1, group=8)
# The registers of these kernels also hold factors of each column, so their tiles have few columns. With float32
# operands the gradients of the prefixes take twice the registers.
DEFAULT_OPTIONS = {
    "prefix_sums": (TileShape(128, 64, 64, 4, 3, 8), TileShape(128, 64, 32, 4, 3, 8)),
    "prefix_gradient": (TileShape(128, 64, 64, 4, 3, 8), TileShape(64, 64, 32, 4, 3, 8)),
    "prefix_products": (TileShape(128, 128, 64, 4, 3, 8), TileShape(128, 128, 32, 8, 3, 8)),
    "teacher_sums": (TileShape(128, 128, 64, 8, 3, 8), TileShape(128, 64, 32, 8, 3, 8)),
    "teacher_gradient": (TileShape(128, 128, 64, 8, 3, 8), TileShape(128, 64, 32, 8, 3, 8)),
}
INTERPRETED = TileShape(32, 16, 32, warps=1, stages=1, group=2)
# The sums kernel has no store in shared memory, so two persistent programs fit on a multiprocessor.
PERSISTENT_KERNEL = "sums"


def tile_shape(kernel: str, dim: int, dtype: torch.dtype, product: str, device: torch.device) -> TileShape:
    """The tile shape of a kernel (one of KERNELS or OPTION_KERNELS) for operands of dimension `dim` and `dtype`."""
    if device.type != "cuda":
        return replace(INTERPRETED, persistent=int(kernel == PERSISTENT_KERNEL))
    name = torch.cuda.get_device_name(device)
    found = _lookup(name, kernel, dim, str(dtype).removeprefix("torch."), product, os.environ.get(VARIABLE))
    if kernel in OPTION_KERNELS:
        return found or DEFAULT_OPTIONS[kernel][dtype.itemsize > 2]
    plain = (
        DEFAULT_KEPT_GRADIENT if kernel == "kept_gradient" else DEFAULT_HALF if dtype.itemsize == 2 else DEFAULT_FLOAT32
    )
    return found or replace(plain, persistent=int(kernel == PERSISTENT_KERNEL))


def precision_name(dtype: str, product: str) -> str:
    """Name of the operand precision in a table: the dtype or, for float32, Triton's `input_precision`."""
    return product if dtype == "float32" else dtype


def write_shapes(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table; each row has device, kernel, precision, dim and the fields of a TileShape."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    os.replace(temporary, path)


def table_row(device: str, kernel: str, precision: str, dim: int, shape: TileShape) -> dict[str, Any]:
    """One row of a table."""
    return {"device": device, "kernel": kernel, "precision": precision, "dim": dim, **asdict(shape)}


@functools.cache
def _lookup(device: str, kernel: str, dim: int, dtype: str, product: str, override: str | None) -> TileShape | None:
    """The row of this device, kernel and precision with the nearest dimension, or None if there is none."""
    precision = precision_name(dtype, product)
    for path in ([Path(override)] if override else []) + [TABLE]:
        rows = [
            row
            for row in read_shapes(path)
            if row["device"] == device and row["kernel"] == kernel and row["precision"] == precision
        ]
        if rows:
            row = min(rows, key=lambda row: (abs(row["dim"] - dim), row["dim"]))
            return TileShape(**{name: row[name] for name in TileShape.__dataclass_fields__})
    return None


@functools.cache
def read_shapes(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a table.

    Raises:
        ValueError: If the file is not a table of tile shapes. The message begins with the path.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            if row["kernel"] not in KERNELS + OPTION_KERNELS or not {"device", "precision"} <= row.keys():
                raise ValueError(
                    f"expected kernel to be one of {', '.join(KERNELS + OPTION_KERNELS)}, found {row['kernel']!r}"
                )
            for name in ("dim", *TileShape.__dataclass_fields__):
                if not isinstance(row[name], int) or row[name] < (0 if name == "persistent" else 1):
                    raise ValueError(f"expected {name} to be a whole number over 0, found {row[name]!r}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected a table of tile shapes: {error}") from error
    return rows
