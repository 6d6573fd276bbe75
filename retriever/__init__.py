"""Dense retrieval: contrastive training of dual towers, encoding, indexing, search and evaluation.

The public names load on first use, so that `import retriever` and `retriever --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import Any

from retriever.utils import own_packages

__version__ = "0.1.0"

_PUBLIC = {
    "InfCLLoss": "losses",
    "SigmoidLoss": "losses",
    "inf_cl_loss": "losses",
    "sigmoid_loss": "losses",
    "EmbeddingStore": "index.store.reader",
    "Index": "index.ann.index",
    "BeirDataset": "index.beir",
    "evaluate_run": "eval.metrics",
    "TrainConfig": "retriever.config.run",
    "split": "retriever.data.split",
    "Towers": "retriever.models.towers",
    "Trainer": "retriever.training.trainer",
    "embed_texts": "retriever.encoding.encoder",
    "encode_passages": "retriever.encoding.corpus",
}

__all__ = ["__version__", *_PUBLIC]

own_packages.install()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'retriever' has no attribute '{name}'")
    module = _PUBLIC[name]
    own_packages.check_imported(module)
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        # Where another 'index' has been imported, Python says no more than that it is not a package.
        own_packages.check_imported(error.name or "")
        raise
