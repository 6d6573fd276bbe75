from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from index.files import InputError, atomic_folder, atomic_path, locked_folder, read_json, recover_folder, write_json


def test_atomic_path_keeps_the_old_file_on_error(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="midway"), atomic_path(target) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("midway")
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_file_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch) -> None:
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


def test_atomic_folder_keeps_the_old_folder_on_error(tmp_path: Path) -> None:
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


def test_a_failed_rename_restores_the_old_folder(tmp_path: Path, monkeypatch) -> None:
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


def test_a_symbolic_link_to_a_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real = tmp_path / "disk" / "model"
    real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    with atomic_folder(link) as temporary:
        (temporary / "weights").write_text("new")
    assert link.is_symlink()
    assert (real / "weights").read_text() == "new"


@pytest.mark.parametrize("kind", [atomic_path, atomic_folder])
def test_leftovers_of_killed_writers_are_removed_and_running_writers_kept(tmp_path: Path, kind) -> None:
    def write(temporary: Path, text: str) -> None:
        (temporary / "weights" if kind is atomic_folder else temporary).write_text(text)

    target = tmp_path / "mo[d]el"
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from index.files import {kind.__name__}
        with {kind.__name__}(Path(sys.argv[1])) as temporary:
            print(temporary.name, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(target)]
    killed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert killed.returncode == -9
    assert os.listdir(tmp_path) == [killed.stdout.strip()]
    other = tmp_path / ".mo[d]el2.01234567.tmp"
    other.write_text("of another name")
    with kind(target) as living:
        write(living, "first")
        with kind(target) as temporary:
            write(temporary, "second")
        assert sorted(os.listdir(tmp_path)) == sorted([other.name, living.name, "mo[d]el"])
    assert sorted(os.listdir(tmp_path)) == [other.name, "mo[d]el"]


def test_without_file_locks_no_temporary_file_is_removed(tmp_path: Path, monkeypatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = tmp_path / ".a.json.01234567.tmp"
    left.write_text("perhaps of a living process of another machine")
    write_json(tmp_path / "a.json", 1)
    assert read_json(tmp_path / "a.json") == 1
    assert left.exists()


def test_a_temporary_file_removed_before_it_was_locked_is_created_again(tmp_path: Path, monkeypatch) -> None:
    flock, seen = fcntl.flock, []

    def robbed(descriptor: int, operation: int) -> None:
        if not seen:
            seen.extend(tmp_path.iterdir())
            seen[0].unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", robbed)
    with atomic_path(tmp_path / "a.txt") as temporary:
        assert temporary.exists() and [temporary] != seen
        temporary.write_text("x")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_new_files_and_folders_have_default_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    write_json(tmp_path / "a.json", 1)
    with atomic_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "folder").stat().st_mode


def exchange_killed(target: Path) -> None:
    """Create the state left by a process killed between the two renames: no `target`, the old and the new folder."""
    retired = target.with_name(f".{target.name}.abcd1234.old")
    retired.mkdir()
    (retired / "weights").write_text("old")
    target.with_name(f".{target.name}.abcd1234.tmp").mkdir()


def test_recover_folder_restores_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "mo[d]el"
    exchange_killed(target)
    for _ in range(2):
        recover_folder(target)
        assert (target / "weights").read_text() == "old"
        assert os.listdir(tmp_path) == ["mo[d]el"]


def test_the_next_write_restores_the_old_folder(tmp_path: Path) -> None:
    exchange_killed(tmp_path / "model")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model"):
        raise RuntimeError
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_an_old_folder_that_was_replaced_is_removed(tmp_path: Path) -> None:
    exchange_killed(tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("new")
    recover_folder(tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert os.listdir(tmp_path) == ["model"]


def test_a_replacement_by_a_running_process_is_not_touched(tmp_path: Path) -> None:
    exchange_killed(tmp_path / "model")
    before = sorted(os.listdir(tmp_path))
    with locked_folder(tmp_path / ".model.abcd1234.tmp"):
        recover_folder(tmp_path / "model")
        assert sorted(os.listdir(tmp_path)) == before


def test_recovering_a_missing_folder_is_a_no_op(tmp_path: Path) -> None:
    recover_folder(tmp_path / "model")
    recover_folder(tmp_path / "run" / "model")
    assert os.listdir(tmp_path) == []


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


def test_locked_folder_excludes_other_processes(tmp_path: Path) -> None:
    with locked_folder(tmp_path), pytest.raises(InputError, match="another process is writing here"):
        locked_folder(tmp_path).__enter__()
    with locked_folder(tmp_path):
        assert tmp_path.is_dir()


def test_a_child_process_does_not_inherit_the_lock(tmp_path: Path) -> None:
    script = """
        import os, sys, time
        from pathlib import Path
        from index.files import locked_folder
        with locked_folder(Path(sys.argv[1])):
            if os.fork() == 0:
                print("ready", flush=True)
                time.sleep(60)
                os._exit(0)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        with pytest.raises(InputError, match="another process"), locked_folder(tmp_path):
            pass
        parent.kill()
        parent.wait()
        with locked_folder(tmp_path):
            pass
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"ü": [1, 2.5, None, "\u2028"]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_nan_and_infinity_are_refused_in_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "data", [b"{", b"\xff{}", b"[" * 100_000, b"1" * 5000, b'"\\ud83d"'], ids=["cut", "bytes", "deep", "huge", "half"]
)
def test_invalid_json_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.json: expected (JSON|Unicode text), found") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
