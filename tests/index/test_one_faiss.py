"""Two packages of faiss, which overwrite each other's files, are refused with the command that mends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from index.ann import factory
from index.files import InputError

ROOT = Path(__file__).resolve().parents[2]


def install(folder: Path, name: str, version: str) -> None:
    """What pip leaves of a package: its metadata."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


def test_two_packages_are_refused_before_faiss_is_imported(tmp_path: Path) -> None:
    install(tmp_path, "faiss-gpu-cuvs", "1.15.1")
    install(tmp_path, "faiss-cpu", "1.15.0")
    code = "from index.ann.factory import import_faiss; import_faiss()"
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "index.files.errors.InputError: faiss: expected one package of it, found faiss-gpu-cuvs 1.15.1 and "
        "faiss-cpu 1.15.0, which overwrite each other's files: "
        "pip uninstall -y faiss-gpu-cuvs faiss-cpu && pip install faiss-gpu-cuvs"
    )


def test_one_package_is_accepted() -> None:
    factory.check_one_faiss()


def test_a_faiss_that_cannot_be_loaded_is_no_missing_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faiss.py").write_text("raise ImportError('libcublas.so.12: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "faiss"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=r"faiss cannot be loaded: libcublas\.so\.12: cannot open"):
        factory.import_faiss()
