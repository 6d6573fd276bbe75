from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from index.files import InputError, atomic_folder, atomic_path, locked_folder, read_json, write_json


def test_a_body_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="midway"), atomic_path(target) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("midway")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch) -> None:
    steps: list[str] = []

    def recorded(name: str, act: Callable) -> Callable:
        def step(*args: object) -> object:
            steps.append(name)
            return act(*args)

        return step

    monkeypatch.setattr(os, "fsync", recorded("flush", os.fsync))
    monkeypatch.setattr(os, "replace", recorded("rename", os.replace))
    write_json(tmp_path / "a.json", 1)
    assert steps == ["flush", "rename", "flush"]


def test_a_body_that_raises_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    with pytest.raises(RuntimeError, match="midway"), atomic_folder(target) as temporary:
        (temporary / "weights").write_text("half of the n")
        raise RuntimeError("midway")
    assert (target / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "old").write_text("1")
    with atomic_folder(target) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "new").write_text("2")
    assert [str(path.relative_to(target)) for path in sorted(target.rglob("*"))] == ["deep", "deep/new"]
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "weights").write_text("old")
    rename = os.rename

    def fail_for_new(source: Path, destination: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_for_new)
    with pytest.raises(OSError, match="No space left"), atomic_folder(target) as temporary:
        (temporary / "weights").write_text("new")
    assert (target / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real = tmp_path / "disk" / "model"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    with atomic_folder(link) as temporary:
        (temporary / "weights").write_text("new")
    assert link.is_symlink()
    assert (real / "weights").read_text() == "new"


def test_a_killed_writer_of_a_folder_is_cleaned_up_after_and_a_living_one_is_not(tmp_path: Path) -> None:
    target = tmp_path / "mo[d]el"
    code = """
        import os, signal, sys
        from pathlib import Path
        from index.files import atomic_folder
        with atomic_folder(Path(sys.argv[1])) as temporary:
            (temporary / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(target)], check=False)
    assert killed.returncode == -9
    left = os.listdir(tmp_path)
    assert len(left) == 1 and left[0].endswith(".tmp")
    with atomic_folder(target) as living:
        with atomic_folder(target) as temporary:
            (temporary / "weights").write_text("second")
        assert living.is_dir()
        assert left[0] not in os.listdir(tmp_path)
    assert os.listdir(tmp_path) == ["mo[d]el"]


def test_an_old_folder_whose_replacement_was_killed_comes_back(tmp_path: Path) -> None:
    retired = tmp_path / ".model.abcd1234.old"
    retired.mkdir()
    (retired / "weights").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model"):
        raise RuntimeError
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "big.json"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"big\.json"):
            write_json(target, ["x" * 5000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_folder_is_held_by_one_writer(tmp_path: Path) -> None:
    with locked_folder(tmp_path), pytest.raises(InputError, match="another process is writing here"):
        locked_folder(tmp_path).__enter__()
    with locked_folder(tmp_path):
        assert tmp_path.is_dir()


def test_json_comes_back_as_written(tmp_path: Path) -> None:
    value = {"ü": [1, 2.5, None, "\u2028"]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_numbers_that_json_has_not_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "data", [b"{", b"\xff{}", b"[" * 100_000, b"1" * 5000, b'"\\ud83d"'], ids=["cut", "bytes", "deep", "huge", "half"]
)
def test_what_is_no_json_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.json: expected (JSON|Unicode text), found") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
