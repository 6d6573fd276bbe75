"""Dense retrieval: contrastive training of dual towers, encoding, indexing, search and evaluation.

The public names load on first use, so that `import retriever` and `retriever --help` stay fast.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from retriever.utils import own_packages
from retriever.utils.versions import __version__

if sys.platform == "darwin":
    # Read by torch when it is imported: operations that Apple's GPU lacks run on the CPU, with one warning for each.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

if TYPE_CHECKING:
    from eval.metrics import evaluate_run as evaluate_run
    from index.ann.index import Index as Index
    from index.beir import BeirDataset as BeirDataset
    from index.files import InputError as InputError
    from index.progress import ProgressEvent as ProgressEvent
    from index.store.reader import EmbeddingStore as EmbeddingStore
    from losses import InfCLLoss as InfCLLoss
    from losses import SigmoidLoss as SigmoidLoss
    from losses import inf_cl_loss as inf_cl_loss
    from losses import sigmoid_loss as sigmoid_loss
    from retriever.config.run import TrainConfig as TrainConfig
    from retriever.data.splitting.split import split as split
    from retriever.encoding.encode import encode as encode
    from retriever.encoding.model import Model as Model
    from retriever.encoding.model import load as load
    from retriever.errors import ConfigError as ConfigError
    from retriever.evaluation.compare_runs import Comparison as Comparison
    from retriever.evaluation.compare_runs import compare as compare
    from retriever.evaluation.evaluate import Evaluation as Evaluation
    from retriever.evaluation.evaluate import evaluate as evaluate
    from retriever.evaluation.probe import Probe as Probe
    from retriever.evaluation.probe import probe as probe
    from retriever.evaluation.zero_shot_sets import ZeroShotEvaluation as ZeroShotEvaluation
    from retriever.evaluation.zero_shot_sets import zero_shot as zero_shot
    from retriever.mining.mine import mine as mine
    from retriever.mining.score import score as score
    from retriever.searching.index import build_index as build_index
    from retriever.searching.near_duplicates import NearDuplicate as NearDuplicate
    from retriever.searching.near_duplicates import NearDuplicates as NearDuplicates
    from retriever.searching.near_duplicates import near_duplicates as near_duplicates
    from retriever.searching.query import search as search
    from retriever.selection.merge import Merge as Merge
    from retriever.selection.merge import merge as merge
    from retriever.selection.study import Study as Study
    from retriever.selection.study import study as study
    from retriever.sharing.export import Exported as Exported
    from retriever.sharing.export import export as export
    from retriever.sharing.export_clip import export_clip as export_clip
    from retriever.sharing.push import Pushed as Pushed
    from retriever.sharing.push import push as push
    from retriever.training.train import TrainingRun as TrainingRun
    from retriever.training.train import train as train
    from retriever.utils.interrupt import Interrupted as Interrupted

# Public name -> the module that defines it.
_PUBLIC = {
    "train": "retriever.training.train",
    "load": "retriever.encoding.model",
    "encode": "retriever.encoding.encode",
    "build_index": "retriever.searching.index",
    "search": "retriever.searching.query",
    "near_duplicates": "retriever.searching.near_duplicates",
    "evaluate": "retriever.evaluation.evaluate",
    "compare": "retriever.evaluation.compare_runs",
    "mine": "retriever.mining.mine",
    "score": "retriever.mining.score",
    "merge": "retriever.selection.merge",
    "study": "retriever.selection.study",
    "zero_shot": "retriever.evaluation.zero_shot_sets",
    "probe": "retriever.evaluation.probe",
    "split": "retriever.data.splitting.split",
    "export": "retriever.sharing.export",
    "push": "retriever.sharing.push",
    "export_clip": "retriever.sharing.export_clip",
    "Model": "retriever.encoding.model",
    "TrainConfig": "retriever.config.run",
    "Exported": "retriever.sharing.export",
    "Pushed": "retriever.sharing.push",
    "TrainingRun": "retriever.training.train",
    "Merge": "retriever.selection.merge",
    "Study": "retriever.selection.study",
    "EmbeddingStore": "index.store.reader",
    "Index": "index.ann.index",
    "NearDuplicate": "retriever.searching.near_duplicates",
    "NearDuplicates": "retriever.searching.near_duplicates",
    "Evaluation": "retriever.evaluation.evaluate",
    "Comparison": "retriever.evaluation.compare_runs",
    "ZeroShotEvaluation": "retriever.evaluation.zero_shot_sets",
    "Probe": "retriever.evaluation.probe",
    "BeirDataset": "index.beir",
    "evaluate_run": "eval.metrics",
    "ProgressEvent": "index.progress",
    "InputError": "index.files",
    "ConfigError": "retriever.errors",
    "Interrupted": "retriever.utils.interrupt",
    "InfCLLoss": "losses",
    "SigmoidLoss": "losses",
    "inf_cl_loss": "losses",
    "sigmoid_loss": "losses",
}

__all__ = ["__version__", *_PUBLIC]

own_packages.install_finder()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
