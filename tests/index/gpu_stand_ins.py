"""Stand-ins for the parts of faiss that need a GPU; the copy of an index stays on the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import faiss
import pytest

from index.ann.gpu import support


class Gpus:
    """GPUs of a faiss that has none.

    Attributes:
        free: free bytes of each GPU.
        copies: for each copied index, its GPUs and whether it was divided into shards.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 1) -> None:
        self.free = [2**40] * count
        self.copies: list[tuple[list[int], bool]] = []

        def copy(resources: list[Any], index: Any, options: Any, gpus: list[int]) -> Any:
            assert len(resources) == len(gpus) and options.indicesOptions == faiss.INDICES_64_BIT
            if isinstance(index, faiss.IndexIVF):
                assert not isinstance(faiss.downcast_index(index.quantizer), faiss.IndexHNSW)
            self.copies.append((list(gpus), options.shard))
            return faiss.clone_index(index)

        space = SimpleNamespace(set_index_parameter=lambda index, name, value: setattr(index, name, value))
        names = {
            "StandardGpuResources": object,
            "GpuMultipleClonerOptions": SimpleNamespace,
            "INDICES_64_BIT": 3,
            "GpuParameterSpace": lambda: space,
            "get_num_gpus": lambda: len(self.free),
            "index_cpu_to_gpu_multiple_py": copy,
        }
        for name, stand_in in names.items():
            monkeypatch.setattr(faiss, name, stand_in, raising=False)
        monkeypatch.setattr(support, "free_bytes", lambda gpu: self.free[gpu])
