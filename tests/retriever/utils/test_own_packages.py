"""Folders and modules named losses, index or eval, next to commands and next to scripts."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import write_beir, write_config

from retriever.config.model import ModelConfig
from retriever.utils import own_packages
from retriever.utils.own_packages import HOME, PACKAGES, PackageClash, check_imported, require


def create(folder: Path, name: str, kind: str) -> Path:
    """Create a folder without code, a package or a module. Returns its file."""
    if kind == "module":
        file = folder / f"{name}.py"
    else:
        (folder / name).mkdir()
        file = folder / name / ("__init__.py" if kind == "package" else "notes.txt")
    file.write_text("mine = True\n")
    return file


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the folder, with the project on the path."""
    env = {**os.environ, "PYTHONPATH": HOME, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONSAFEPATH", None)
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder at the start of sys.path, in a process that has not imported the packages."""
    for module in list(sys.modules):
        if module.split(".")[0] in PACKAGES:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    # Modules imported meanwhile would affect later tests.
    for module in list(sys.modules):
        if module.split(".")[0] in PACKAGES:
            del sys.modules[module]


def imported_by(file: str, name: str) -> Any:
    """Import a name as code of the given file."""
    found: dict[str, Any] = {"__name__": Path(file).stem, "__file__": file}
    exec(f"import {name}", found)
    return found[name.split(".")[0]]


OURS = os.path.join(HOME, "retriever", "anything.py")


@pytest.mark.parametrize("name", PACKAGES)
class TestEachPackage:
    def test_a_folder_without_init_does_not_shadow_the_package(self, user_folder: Path, name: str) -> None:
        create(user_folder, name, "folder")
        for importer in (OURS, str(user_folder / "script.py")):
            # Not imported, because torch operators can be registered only once per process.
            found: dict[str, Any] = {"__file__": importer, "find_spec": importlib.util.find_spec}
            exec(f"spec = find_spec('{name}')", found)
            assert found["spec"].origin == os.path.join(HOME, name, "__init__.py")

    @pytest.mark.parametrize("kind", ["package", "module"])
    def test_another_module_is_refused_only_for_imports_of_this_project(
        self, user_folder: Path, name: str, kind: str
    ) -> None:
        file = create(user_folder, name, kind)
        with pytest.raises(PackageClash) as refused:
            imported_by(OURS, name)
        assert name not in sys.modules, "code of the user has been run"
        assert imported_by(str(user_folder / "script.py"), name).mine
        for check in (check_imported, require):
            with pytest.raises(PackageClash, match="has been imported under that name"):
                check(name)
        message = str(refused.value)
        assert f"rename {file}" in message and os.path.join(HOME, name, "__init__.py") in message

    def test_a_previously_imported_package_is_not_searched(self, user_folder: Path, name: str) -> None:
        create(user_folder, name, "package")
        (user_folder / name / "files.py").write_text("mine = True\n")
        script = str(user_folder / "script.py")
        assert imported_by(script, f"{name}.files").files.mine
        sys.modules.pop(f"{name}.files")
        with pytest.raises(PackageClash):
            imported_by(OURS, f"{name}.files")


def test_a_public_name_imports_only_its_own_packages(user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import retriever

    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} imported"))
    file = create(user_folder, "eval", "module")
    imported_by(str(user_folder / "script.py"), "eval")
    with pytest.raises(PackageClash, match=str(file)):
        _ = retriever.evaluate_run
    with pytest.raises(AttributeError):
        _ = retriever.nothing


def test_a_clash_in_a_nested_import_is_explained(user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import retriever

    file = create(user_folder, "index", "module")
    imported_by(str(user_folder / "script.py"), "index")
    monkeypatch.delitem(sys.modules, "retriever.searching.search", raising=False)
    monkeypatch.setitem(retriever._PUBLIC, "open_indexes", "retriever.searching.search")
    with pytest.raises(PackageClash, match=str(file)):
        _ = retriever.open_indexes


def test_the_finder_is_installed_once() -> None:
    finders = [isinstance(finder, own_packages.OwnPackages) for finder in sys.meta_path]
    assert sum(finders) == 1
    own_packages.install_finder()
    assert sum(isinstance(finder, own_packages.OwnPackages) for finder in sys.meta_path) == 1


def test_the_command_does_not_import_from_the_working_directory(tmp_path: Path) -> None:
    for name in ("losses", "tyro", "yaml"):
        create(tmp_path, name, "module").write_text("raise SystemExit(7)")
    for name in ("index", "eval", "torch"):
        create(tmp_path, name, "package").write_text("raise SystemExit(7)")
    done = python(tmp_path, "-m", "retriever", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: retriever"), done.stderr


def test_a_clash_on_the_path_is_reported_in_one_line(tmp_path: Path) -> None:
    file = create(tmp_path, "index", "module")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from retriever.__main__ import main; sys.exit(main())"
    done = python(tmp_path, "-c", code)
    assert done.returncode == 1 and done.stderr.startswith("retriever: retriever needs its own package 'index'")
    assert str(file) in done.stderr and done.stderr.count("\n") == 1


SCRIPT = """
import json, sys
from pathlib import Path
import eval as mine
from retriever import InfCLLoss, Model, encode
from retriever.cli.command_line import main
assert mine.mine and InfCLLoss().logit_scale > 0
if __name__ == "__main__":
    codes = [main(["train", "run.yaml", "--steps", "1", "--data.workers", "1"])]
    codes += [main(["encode", "--model", "run/model", "--data", "words", "--out", "index"])]
    ours = [name for name in sys.modules if name.startswith("eval.")]
    codes += [main(["train", "run.yaml", "--steps", "1", "--out", "other", "--dev.path", "words"])]
    print(json.dumps([codes, ours]))
"""


def test_training_and_encoding_work_next_to_a_users_eval(tiny: ModelConfig, tmp_path: Path) -> None:
    # A BEIR folder is read for both; a worker process imports the script anew.
    write_beir(tmp_path / "words")
    write_config(tmp_path / "run.yaml", tiny, tmp_path / "words", data={"sources": [{"path": "words"}]}, out="run")
    for name in ("losses", "index"):
        create(tmp_path, name, "folder").unlink()
    file = create(tmp_path, "eval", "module")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = python(tmp_path, "script.py")
    assert done.returncode == 0, done.stderr
    codes, ours = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0, 1] and ours == []
    last = done.stderr.splitlines()[-1]
    assert last.startswith("retriever: retriever needs its own package 'eval'") and str(file) in last
