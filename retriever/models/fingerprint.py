"""What embeddings depend on, for checksums that identify a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retriever.models.sharded_tensors import full_tensor

if TYPE_CHECKING:
    from hashlib import _Hash

# Keys of a transformers configuration that do not affect embeddings.
_PROVENANCE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


def without_provenance(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a transformers configuration without the keys that do not affect embeddings, at all levels."""
    return {
        name: without_provenance(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in _PROVENANCE
    }


def add_weights(digest: _Hash, weights: Mapping[str, Tensor], prefix: str = "") -> None:
    """Add names, dtypes, shapes and values of weights, sorted by name, to a digest; `prefix` goes before each name."""
    for name, tensor in sorted(weights.items()):
        digest.update(f"{prefix}{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content: Any = full_tensor(tensor.detach()).cpu().contiguous()
        digest.update(content.view(-1).view(torch.uint8).numpy())
