"""The public function `retriever.export_clip`, which writes an image–text model for open_clip or transformers."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Literal, get_args

from index.files import InputError
from index.progress import Progress
from retriever.encoding.model import ModelInput, as_model
from retriever.errors import ArgumentError, check_choice, check_paths
from retriever.models.images.export import export_towers

Form = Literal["open_clip", "transformers"]


def export_clip(
    model: ModelInput,
    out: str | Path,
    *,
    form: Form = "open_clip",
    logit_scale: float = 100.0,
    progress: Progress = None,
) -> Path:
    """Write an image–text model in the form of open_clip or of transformers' CLIP.

    The image tower must be a CLIP vision transformer, as `model.image.name: ViT-B/32` and the like make it. The text
    tower must be that of a CLIP model, or, for open_clip, BERT, RoBERTa or XLM-RoBERTa with mean or cls pooling. The
    embeddings of both libraries are those of `model`, before they are scaled to unit length.

    open_clip reads the folder with `open_clip.create_model_and_transforms("local-dir:OUT")`. With a text tower of
    transformers, its configuration names the folder itself: edit `hf_model_name` and `hf_tokenizer_name` in
    open_clip_config.json if the folder moves.

    Args:
        model: A model from `retriever.load`, or its folder or hub name.
        out: A new or empty folder.
        form: "open_clip" or "transformers". Default: "open_clip".
        logit_scale: 1 / temperature, stored with the weights. Default: 100.
        progress: Called with a `ProgressEvent` while the model is loaded. Default: None.

    Returns:
        The folder.

    Raises:
        InputError: The form cannot express the model, or `out` is not empty.
        ConfigError: An argument is invalid.
    """
    check_choice(get_args(Form), form=form)
    check_paths(out=out)
    if not (math.isfinite(logit_scale) and logit_scale > 0):
        raise ArgumentError("logit_scale", f"expected a positive number, found {logit_scale}")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: expected a new or empty folder, found files")
    opened = as_model(model, progress)
    towers = opened.image_towers()
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        export_towers(towers, folder, form, logit_scale)
    except BaseException as error:
        # A folder of a part of the files would look like a model.
        shutil.rmtree(folder)
        if existed:
            folder.mkdir()
        if isinstance(error, InputError):
            raise InputError(f"{opened.name}: {error}") from None
        raise
    return folder
