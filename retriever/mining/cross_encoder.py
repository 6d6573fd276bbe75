"""Scores of pairs by a cross-encoder, a model that reads query and passage together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from index.files import InputError, read_json
from retriever.models.loading.checks import check_folder, check_hub_name
from retriever.models.loading.errors import is_load_error, one_line
from retriever.models.loading.hub import hub_problem, local_model
from retriever.utils.device import Precision

BATCH_PAIRS = {"cpu": 32, "cuda": 256}
# Pairs per call, between two reports of progress.
CALL_PAIRS = 4096
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def is_cross_encoder(model: str) -> bool:
    """Whether a folder contains a cross-encoder: a classifier of pairs, and not a model of sentence embeddings."""
    path = Path(model)
    settings = path / "config_sentence_transformers.json"
    try:
        if settings.exists() and (kind := _object(settings).get("model_type")):
            return kind == "CrossEncoder"
        config = _object(path / "config.json")
    except (OSError, InputError):
        # Loading the model reports what is wrong with it.
        return False
    kinds = config.get("architectures")
    named = isinstance(kinds, list) and any("SequenceClassification" in str(name) for name in kinds)
    return named and not (path / "modules.json").exists()


def _object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    return content if isinstance(content, dict) else {}


class CrossEncoderScorer:
    """A cross-encoder of sentence-transformers with one output.

    Args:
        name: Folder or hub name, which may end in @revision.
        device: The device.
        precision: Precision of its weights. Default: "fp32".
        logits: Whether scores are the outputs before the activation function of the model, which is a sigmoid unless
            the model says otherwise. Default: False, as `CrossEncoder.predict` gives them.

    Raises:
        InputError: There is no such model, it has custom code, no weights as safetensors, or several outputs.
    """

    def __init__(
        self, name: str, device: torch.device | str, precision: Precision = "fp32", *, logits: bool = False
    ) -> None:
        from sentence_transformers import CrossEncoder

        check_hub_name(name)
        location = local_model(name)
        if found := Path(location).is_dir():
            check_folder(Path(location))
        # Weights in the pickle format are not read.
        settings: dict[str, Any] = {"use_safetensors": True, "dtype": _DTYPES[precision]}
        try:
            self._model = CrossEncoder(location, device=str(device), model_kwargs=settings)
            # A pair is scored, because some settings of a damaged folder fail only then.
            shape = np.shape(self._model.predict([("a", "a")], show_progress_bar=False))
        except Exception as error:
            if not is_load_error(error):
                raise
            problem = f"cannot be loaded as a cross-encoder: {one_line(error)}" if found else hub_problem(error)
            raise InputError(f"{name}: {problem}") from None
        if shape != (1,):
            raise InputError(f"{name}: expected a cross-encoder with one output, found {self._model.num_labels}")
        self._name = name
        self._batch = BATCH_PAIRS.get(torch.device(device).type, BATCH_PAIRS["cpu"])
        self._options: dict[str, Any] = {"activation_fn": torch.nn.Identity()} if logits else {}

    def scores(self, pairs: Sequence[tuple[str, str]], progress: Callable[[int], None] | None = None) -> np.ndarray:
        """Return the scores of (query, passage) pairs, float32 [pairs].

        Raises:
            InputError: A score is not finite, or the tokenizer does not fit the model.
        """
        # Pairs of similar length are scored together.
        order = np.argsort([len(query) + len(passage) for query, passage in pairs], kind="stable")[::-1]
        scores = np.empty(len(pairs), np.float32)
        for start in range(0, len(order), CALL_PAIRS):
            rows = order[start : start + CALL_PAIRS]
            try:
                scores[rows] = self._model.predict(
                    [pairs[row] for row in rows], batch_size=self._batch, show_progress_bar=False, **self._options
                )
            except IndexError as error:
                # A tokenizer with more tokens than the model has, for example.
                raise InputError(f"{self._name}: cannot score these texts: {one_line(error)}") from None
            if progress is not None:
                progress(len(rows))
        if not np.isfinite(scores).all():
            query, passage = pairs[int(np.argmin(np.isfinite(scores)))]
            raise InputError(f"the cross-encoder's score of {query!r:.40} and {passage!r:.40} is not finite")
        return scores
