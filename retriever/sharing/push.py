"""The public function `retriever.push`, which uploads a model folder to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index.files import InputError
from index.progress import Progress, as_reporter
from retriever.errors import ArgumentError, check_paths
from retriever.models.card.card import CARD_FILE
from retriever.models.card.usage import FOLDER
from retriever.models.loading.checks import check_folder
from retriever.models.loading.checksums import known_checksums, verify_checksums
from retriever.models.loading.errors import disable_progress_bars, one_line
from retriever.utils.check_progress import byte_progress


@dataclass(frozen=True)
class Pushed:
    """A model folder that was pushed to the hub, or would be.

    Attributes:
        repo: Name of the repository.
        revision: Branch.
        files: Path in the repository -> size in bytes.
        commit: Commit on the hub; "" after a dry run.
        url: Address of the commit; "" after a dry run.
    """

    repo: str
    revision: str
    files: dict[str, int]
    commit: str = ""
    url: str = ""

    @property
    def pinned(self) -> str:
        """The name with which exactly this model is loaded: `owner/name@commit`."""
        return f"{self.repo}@{self.commit or self.revision}"


def push(
    model: str | Path,
    repo: str,
    *,
    private: bool = True,
    revision: str = "main",
    message: str = "Upload model",
    dry_run: bool = False,
    progress: Progress = None,
) -> Pushed:
    """Upload a model folder to a repository of the Hugging Face Hub, which is created if it does not exist.

    All files are in one commit. In the model card, the location of the model becomes the name of the repository. The
    access token is that of `hf auth login` or of the environment variable HF_TOKEN.

    Args:
        model: A model folder.
        repo: Name of the repository, "owner/name".
        private: Whether a new repository is private. An existing one stays as it is. Default: True.
        revision: Branch, which is created if it does not exist. Default: "main".
        message: Message of the commit. Default: "Upload model".
        dry_run: Whether to check everything that can be checked without the network, and to upload nothing. Default:
            False.
        progress: Called with a `ProgressEvent` while the files are checked. Default: None.

    Returns:
        The repository, its commit, and the files.

    Raises:
        ArgumentError: The name of the repository or of the branch is invalid.
        InputError: The folder is not a model, one of its files is damaged, or the hub cannot be reached or refuses.
    """
    check_paths(model=model)
    folder, reporter = Path(model), as_reporter(progress)
    _check_names(repo, revision)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    check_folder(folder)
    size = sum(path.stat().st_size for path in known_checksums(str(folder)))
    with byte_progress(reporter, folder.name, size) as checked:
        verify_checksums(str(folder), checked)
    contents = _contents(folder, repo, revision)
    sizes = {name: len(each) if isinstance(each, bytes) else each.stat().st_size for name, each in contents.items()}
    if dry_run:
        return Pushed(repo, revision, sizes)
    commit = _upload(contents, repo, revision, private, message)
    return Pushed(repo, revision, sizes, commit.oid, commit.commit_url)


def _check_names(repo: str, revision: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ArgumentError("repo", f"expected owner/name, found {repo!r:.60}: {one_line(error)}") from None
    if repo.count("/") != 1:
        raise ArgumentError("repo", f"expected owner/name, found {repo!r:.60}")
    if not revision or any(character.isspace() for character in revision):
        raise ArgumentError("revision", f"expected the name of a branch, found {revision!r:.60}")


def _contents(folder: Path, repo: str, revision: str) -> dict[str, Path | bytes]:
    """Return path in the repository -> file, or content of the card, which names the repository."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for path in files
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    card = folder / CARD_FILE
    if not card.is_file():
        raise InputError(f"{card}: expected a model card, as training writes it, found none")
    text = card.read_text(encoding="utf-8")
    if revision != "main":
        text = text.replace(f'retriever.load("{FOLDER}")', f'retriever.load("{repo}@{revision}")')
        text = text.replace(f'"{FOLDER}"', f'"{repo}", revision="{revision}"')
    text = text.replace(FOLDER, repo)
    _check_metadata(text, card)
    return {**contents, CARD_FILE: text.encode()}


def _check_metadata(text: str, path: Path) -> None:
    """Raise an InputError if huggingface_hub does not accept the metadata of a card."""
    import yaml
    from huggingface_hub import ModelCard

    try:
        # Errors in the evaluation results are not ignored.
        ModelCard(text, ignore_metadata_errors=False)
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: expected metadata of a model card, found an error: {one_line(error)}") from error


def _upload(contents: dict[str, Path | bytes], repo: str, revision: str, private: bool, message: str) -> Any:
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, constants

    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{repo}: not pushed: the hub is not contacted offline (HF_HUB_OFFLINE is set)")
    if huggingface_hub.get_token() is None:
        raise InputError(f"{repo}: not pushed: no access token: run 'hf auth login', or set HF_TOKEN")
    disable_progress_bars()
    api = huggingface_hub.HfApi(library_name="dense-retriever")
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=each) for name, each in contents.items()]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision != "main":
            api.create_branch(repo, branch=revision, exist_ok=True)
        return api.create_commit(repo, operations, commit_message=message, revision=revision)
    # Errors of the hub and of the connection are OSErrors.
    except OSError as error:
        raise InputError(f"{repo}: not pushed: {one_line(error)}") from error
