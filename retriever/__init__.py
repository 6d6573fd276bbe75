"""Dense retrieval: contrastive training of dual towers, encoding, indexing, search and evaluation.

The public names load on first use, so that `import retriever` and `retriever --help` stay fast.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HOME = Path(__file__).resolve().parent.parent

_PUBLIC = {
    "InfCLLoss": "losses",
    "SigmoidLoss": "losses",
    "inf_cl_loss": "losses",
    "sigmoid_loss": "losses",
    "EmbeddingStore": "index.embeddings",
    "Index": "index.faiss_index",
    "BeirDataset": "index.beir",
    "evaluate_run": "eval.metrics",
    "TrainConfig": "retriever.config",
    "Towers": "retriever.towers",
    "Trainer": "retriever.trainer",
    "embed_texts": "retriever.encode",
    "encode_passages": "retriever.encode_corpus",
}

__all__ = ["__version__", *_PUBLIC]


def _refuse_shadows() -> None:
    """`losses`, `index` and `eval` are common names; another package of that name would be imported in silence."""
    for package in ("losses", "index", "eval"):
        found = importlib.util.find_spec(package)
        origin = Path(found.origin).resolve() if found is not None and found.origin else None
        if origin != _HOME / package / "__init__.py":
            raise ImportError(
                f"retriever needs its own package '{package}' in {_HOME / package}, but Python finds "
                f"{origin or 'none'}: remove that one from sys.path, or run from another folder"
            )


_refuse_shadows()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'retriever' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
