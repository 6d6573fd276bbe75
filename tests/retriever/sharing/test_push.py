"""Pushing a model folder, and loading it again by name and revision from a cache in the layout of the hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from cli_helpers import World, assert_refused, command
from huggingface_hub import constants

import retriever
from retriever.models.card.card import CARD_FILE

COMMIT = hashlib.sha1(b"commit").hexdigest()


class HubInAFolder:
    """Stands for the hub: writes commits into a cache folder in the layout that the hub's client downloads to."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repo": repo, **options}))

    def create_branch(self, repo: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo": repo, **options}))

    def create_commit(self, repo: str, operations: list[Any], *, commit_message: str, revision: str) -> Any:
        self.calls.append(("create_commit", {"repo": repo, "message": commit_message, "revision": revision}))
        folder = self.cache / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / COMMIT
        (folder / "blobs").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / revision).write_text(COMMIT)
        for operation in operations:
            with operation.as_file() as stream:
                content = stream.read()
            blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            path = snapshot / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(blob)
        return SimpleNamespace(oid=COMMIT, commit_url=f"https://hub/{repo}/commit/{COMMIT}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubInAFolder:
    hub = HubInAFolder(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **options: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    return hub


def test_a_pushed_model_is_loaded_at_a_revision(
    world: World, hub: HubInAFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    outcome = command("push", "--model", world.model, "--repo", "acme/words", "--revision", "v1", "--public", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["pinned"] == f"acme/words@{COMMIT}"
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "create_commit"]
    assert hub.calls[0][1] == {"repo": "acme/words", "private": False, "exist_ok": True}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    texts = ["what is a cat?", "define oak"]
    expected = retriever.load(world.model).encode_queries(texts)
    for revision in (COMMIT, "v1"):
        model = retriever.load(f"acme/words@{revision}")
        np.testing.assert_array_equal(model.encode_queries(texts), expected)
    card = (hub.cache / "models--acme--words" / "snapshots" / COMMIT / CARD_FILE).read_text()
    assert 'SentenceTransformer("acme/words", revision="v1")' in card and 'load("acme/words@v1")' in card
    # Training, encoding and searching take the name, too; the card of the new model has its revision.
    run, store = tmp_path / "run", tmp_path / "store"
    words = ["--model.name", "acme/words@v1", "--out", run, "--steps", "1", "--batch-size", "8", "--data.workers", "0"]
    outcome = command("train", without_model(world, tmp_path / "run.yaml"), *words)
    assert outcome.code == 0, outcome.err
    metadata = huggingface_hub.ModelCard.load(run / "model" / CARD_FILE).data
    assert metadata.base_model == ["acme/words"]
    assert COMMIT in (run / "model" / CARD_FILE).read_text()
    assert command("encode", "--model", "acme/words@v1", "--data", world.beir, "--out", store).code == 0
    # A damaged file of the cache is found by its name.
    blob = (hub.cache / "models--acme--words" / "snapshots" / COMMIT / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-4] + b"abcd")
    assert_refused(command("encode", "--model", "acme/words@v1", "--data", world.beir, "--out", store), 1, "damaged")


def without_model(world: World, path: Path) -> Path:
    import yaml

    tree = yaml.safe_load(world.config.read_text())
    path.write_text(yaml.safe_dump({key: tree[key] for key in ("data", "precision")}))
    return path


@pytest.mark.parametrize(
    ("words", "code", "pattern"),
    [
        (["--repo", "acme/words"], 1, "offline"),
        (["--repo", "words"], 2, "--repo: expected owner/name"),
        (["--repo", "acme/words", "--revision", "a b"], 2, "--revision: expected the name of a branch"),
    ],
)
def test_a_push_is_refused_in_one_line(world: World, words: list[str], code: int, pattern: str) -> None:
    assert_refused(command("push", "--model", world.model, *words), code, pattern)


def test_a_dry_run_lists_the_files_and_checks_the_card(world: World, hub: HubInAFolder, tmp_path: Path) -> None:
    import shutil

    outcome = command("push", "--model", world.model, "--repo", "acme/words", "--dry-run")
    assert outcome.code == 0 and "model.safetensors" in outcome.out and not hub.calls
    shutil.copytree(world.model, folder := tmp_path / "model")
    text = (folder / CARD_FILE).read_text()
    (folder / CARD_FILE).write_text(text.replace("tags:", "model-index: 3\ntags:"))
    assert_refused(command("push", "--model", folder, "--repo", "acme/words", "--dry-run"), 1, CARD_FILE, "metadata")
    (folder / CARD_FILE).unlink()
    assert_refused(command("push", "--model", folder, "--repo", "acme/words", "--dry-run"), 1, "model card")


def test_a_name_that_is_not_cached_is_refused_offline(world: World, hub: HubInAFolder, tmp_path: Path) -> None:
    for name in ("acme/none@v1", "acme/none"):
        words = ("--model", name, "--data", world.beir, "--out", tmp_path / "store")
        assert_refused(command("encode", *words), 1, f"{name}: .*offline")
    assert_refused(command("encode", "--model", "acme/none@", *words[2:]), 1, "acme/none@: expected a branch")
