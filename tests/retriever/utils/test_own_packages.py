"""Folders and modules called losses, index or eval: beside the commands, and beside scripts and notebooks."""

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

from retriever.config.run import ModelConfig
from retriever.utils import own_packages
from retriever.utils.own_packages import HOME, PACKAGES, PackageClash, check_imported, need


def lay(folder: Path, name: str, kind: str) -> Path:
    """A folder without code, a package or a module of that name; the file that Python would import."""
    if kind == "module":
        file = folder / f"{name}.py"
    else:
        (folder / name).mkdir()
        file = folder / name / ("__init__.py" if kind == "package" else "notes.txt")
    file.write_text("mine = True\n")
    return file


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """An interpreter in the folder, with the project installed."""
    env = {**os.environ, "PYTHONPATH": HOME, "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONSAFEPATH", None)
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder first on the path of this process, to which none of the packages is known yet."""
    for module in list(sys.modules):
        if module.split(".")[0] in PACKAGES:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    # Those that were not there before would stay, and later tests would meet them.
    for module in list(sys.modules):
        if module.split(".")[0] in PACKAGES:
            del sys.modules[module]


def imported_by(file: str, name: str) -> Any:
    """What the code of a file gets when it imports that name."""
    found: dict[str, Any] = {"__name__": Path(file).stem, "__file__": file}
    exec(f"import {name}", found)
    return found[name.split(".")[0]]


OURS = os.path.join(HOME, "retriever", "anything.py")


@pytest.mark.parametrize("name", PACKAGES)
class TestEachPackage:
    def test_a_folder_without_code_never_matters(self, beside: Path, name: str) -> None:
        lay(beside, name, "folder")
        for importer in (OURS, str(beside / "script.py")):
            # Found and not imported: operators of torch are registered once in a process.
            found: dict[str, Any] = {"__file__": importer, "find_spec": importlib.util.find_spec}
            exec(f"spec = find_spec('{name}')", found)
            assert found["spec"].origin == os.path.join(HOME, name, "__init__.py")

    @pytest.mark.parametrize("kind", ["package", "module"])
    def test_other_code_is_the_users_and_refused_where_ours_is_needed(self, beside: Path, name: str, kind: str) -> None:
        file = lay(beside, name, kind)
        with pytest.raises(PackageClash) as refused:
            imported_by(OURS, name)
        assert name not in sys.modules, "code of the user has been run"
        assert imported_by(str(beside / "script.py"), name).mine
        for check in (check_imported, need):
            with pytest.raises(PackageClash, match="has been imported under that name"):
                check(name)
        message = str(refused.value)
        assert f"rename {file}" in message and os.path.join(HOME, name, "__init__.py") in message

    def test_a_package_that_was_imported_before_is_not_searched(self, beside: Path, name: str) -> None:
        lay(beside, name, "package")
        (beside / name / "files.py").write_text("mine = True\n")
        script = str(beside / "script.py")
        assert imported_by(script, f"{name}.files").files.mine
        sys.modules.pop(f"{name}.files")
        with pytest.raises(PackageClash):
            imported_by(OURS, f"{name}.files")


def test_public_names_need_no_more_than_their_own_packages(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import retriever

    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} imported"))
    file = lay(beside, "eval", "module")
    imported_by(str(beside / "script.py"), "eval")
    with pytest.raises(PackageClash, match=str(file)):
        _ = retriever.evaluate_run
    with pytest.raises(AttributeError):
        _ = retriever.nothing


def test_what_python_says_of_a_clash_inside_is_explained(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import retriever

    file = lay(beside, "index", "module")
    imported_by(str(beside / "script.py"), "index")
    monkeypatch.delitem(sys.modules, "retriever.searching.search", raising=False)
    monkeypatch.setitem(retriever._PUBLIC, "open_indexes", "retriever.searching.search")
    with pytest.raises(PackageClash, match=str(file)):
        _ = retriever.open_indexes


def test_the_finder_stands_before_those_of_python() -> None:
    finders = [isinstance(finder, own_packages.OwnPackages) for finder in sys.meta_path]
    assert sum(finders) == 1
    own_packages.install_finder()
    assert sum(isinstance(finder, own_packages.OwnPackages) for finder in sys.meta_path) == 1


def test_the_command_does_not_look_in_the_working_directory(tmp_path: Path) -> None:
    for name in ("losses", "tyro", "yaml"):
        lay(tmp_path, name, "module").write_text("raise SystemExit(7)")
    for name in ("index", "eval", "torch"):
        lay(tmp_path, name, "package").write_text("raise SystemExit(7)")
    done = python(tmp_path, "-m", "retriever", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: retriever"), done.stderr


def test_a_clash_on_the_path_is_one_line_of_the_command(tmp_path: Path) -> None:
    file = lay(tmp_path, "index", "module")
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


def test_training_and_encoding_work_beside_a_users_eval(tiny: ModelConfig, tmp_path: Path) -> None:
    # A BEIR folder is read for both; a worker process imports the script anew.
    write_beir(tmp_path / "words")
    write_config(tmp_path / "run.yaml", tiny, tmp_path / "words", data={"sources": [{"path": "words"}]}, out="run")
    for name in ("losses", "index"):
        lay(tmp_path, name, "folder").unlink()
    file = lay(tmp_path, "eval", "module")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = python(tmp_path, "script.py")
    assert done.returncode == 0, done.stderr
    codes, ours = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0, 1] and ours == []
    last = done.stderr.splitlines()[-1]
    assert last.startswith("retriever: retriever needs its own package 'eval'") and str(file) in last
