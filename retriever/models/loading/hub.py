"""Names on the Hugging Face Hub: `owner/name` and `owner/name@revision`, found in the cache or downloaded."""

from __future__ import annotations

from pathlib import Path

from index.files import InputError
from retriever.models.loading.errors import disable_progress_bars, one_line

# Weights of other frameworks and exports.
_OTHER_WEIGHTS = ["onnx/*", "openvino/*", "coreml/*", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.tflite"]
_OLD_WEIGHTS = ["*.bin", "*.pt"]


def split_revision(name: str) -> tuple[str, str | None]:
    """Return the hub name and the revision of `owner/name@revision`; None without a revision.

    Raises:
        InputError: The revision is empty.
    """
    base, at, revision = name.partition("@")
    if at and not revision:
        raise InputError(f"{name}: expected a branch, a tag or a commit after @, found nothing")
    return base, revision or None


def local_model(path_or_name: str, *, only: tuple[str, ...] = ()) -> str:
    """Return the folder of a model whose hub name has a revision; anything else is returned as it is.

    Args:
        path_or_name: A folder, a hub name, or a hub name with a revision.
        only: Patterns of the files that are needed, such as "*.json". Default: (), all files of a PyTorch model.

    Raises:
        InputError: There is no such model or revision, or it is not in the cache and the hub cannot be reached.
    """
    name, revision = (path_or_name, None) if Path(path_or_name).is_dir() else split_revision(path_or_name)
    if revision is None:
        return path_or_name
    from huggingface_hub import snapshot_download

    disable_progress_bars()
    try:
        if only:
            return snapshot_download(name, revision=revision, allow_patterns=list(only))
        folder = snapshot_download(name, revision=revision, ignore_patterns=[*_OTHER_WEIGHTS, *_OLD_WEIGHTS])
        if not any(Path(folder).rglob("*.safetensors")):
            folder = snapshot_download(name, revision=revision, ignore_patterns=_OTHER_WEIGHTS)
        return folder
    except (OSError, ValueError) as error:
        raise InputError(f"{path_or_name}: {hub_problem(error)}") from error


def cached_model(path_or_name: str) -> Path | None:
    """Return the folder of a model, which for a hub name is in the hub's cache; None if it is not downloaded."""
    if Path(path_or_name).is_dir():
        return Path(path_or_name)
    from huggingface_hub import snapshot_download

    name, revision = split_revision(path_or_name)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        # Not downloaded yet, or not a valid hub name. Loading the model reports the latter.
        return None


def hub_problem(error: Exception) -> str:
    """Say on one line why a hub name could not be loaded."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "no such folder, and not in the cache of the hub, which is not contacted offline (HF_HUB_OFFLINE is set)"
    return f"no such folder, and no such model on the hub: {one_line(error)}"
