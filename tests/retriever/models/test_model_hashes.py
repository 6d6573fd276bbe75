"""A model whose files are not what was saved or downloaded embeds nothing."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import assert_refused, command

from index.files import InputError
from retriever.models.loading.hashes import SUMS_FILE, check_sums


@pytest.fixture
def model(world: Any, tmp_path: Path) -> Path:
    return shutil.copytree(world.model, tmp_path / "model")


def flip(path: Path) -> bytes:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return data


def test_a_run_saves_the_sums_of_its_weights_and_vocabulary(model: Path) -> None:
    listed = {line.split("  ", 1)[1] for line in (model / SUMS_FILE).read_text().splitlines()}
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    weights = {name for name in files if name.endswith(".safetensors")}
    assert weights and listed >= {*weights, "tokenizer.json"}
    assert not listed & {"config.json", "config_sentence_transformers.json", "modules.json", "README.md"}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS_FILE], cwd=model, check=True)


def test_every_file_that_has_a_sum_is_checked(model: Path) -> None:
    check_sums(str(model))
    for line in (model / SUMS_FILE).read_text().splitlines():
        path = model / line.split("  ", 1)[1]
        data = flip(path)
        with pytest.raises(InputError, match=rf"{path}: damaged: expected sha256 .* remove {SUMS_FILE}"):
            check_sums(str(model))
        path.unlink()
        check_sums(str(model))
        path.write_bytes(data)
    (model / SUMS_FILE).write_text("model.safetensors\n")
    with pytest.raises(InputError, match=rf"{SUMS_FILE}:1: expected a sha256 and the name"):
        check_sums(str(model))
    (model / SUMS_FILE).write_text(f"{'0' * 64}  ../other\n")
    with pytest.raises(InputError, match=rf"{SUMS_FILE}:1: expected a sha256 and the name"):
        check_sums(str(model))
    (model / SUMS_FILE).unlink()
    check_sums(str(model))


def test_no_command_embeds_with_a_damaged_model(world: Any, model: Path, tmp_path: Path) -> None:
    flip(model / "model.safetensors")
    words, out = ("--model", model), tmp_path / "out"
    for command_words in (
        ("encode", *words, "--data", world.beir, "--out", out),
        ("evaluate", "beir", *words, "--data", world.beir, "--out", out),
        ("mine", *words, "--data", world.beir, "--out", tmp_path / "out.jsonl"),
        ("search", *words, "--index", world.index, "an oak"),
    ):
        assert_refused(command(*command_words), 1, rf"{model}/model\.safetensors: damaged")
    assert not out.exists() and not (tmp_path / "out.jsonl").exists()


def test_files_in_the_hub_s_cache_have_the_sums_of_their_names(model: Path, tmp_path: Path) -> None:
    (model / SUMS_FILE).unlink()
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        data = (model / name).read_bytes()
        # Small files have another name there, which is not checked.
        blob = blobs / (hashlib.sha256 if name.endswith("safetensors") else hashlib.sha1)(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / name).symlink_to(blob)
    check_sums(str(snapshot))
    flip((snapshot / "model.safetensors").resolve())
    with pytest.raises(InputError, match=r"model\.safetensors: damaged: expected sha256 .* download it again"):
        check_sums(str(snapshot))


def test_a_name_that_is_no_folder_has_nothing_to_check() -> None:
    for name in ("no/such-model", "", "../x", "a b"):
        check_sums(name)
