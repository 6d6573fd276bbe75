"""Make imports of `losses`, `index` and `eval` find the packages of this project, or raise a clear error.

These names are common. A folder without `__init__.py` never shadows them. If Python finds another module or package of
the same name first, such as a user's eval.py, user code imports that one, and an import in code of this project raises
an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder

PACKAGES = ("losses", "index", "eval")
# The folder that holds all four packages.
HOME = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


class PackageClash(ImportError):
    """Another module has the name of one of these packages."""


class OwnPackages(MetaPathFinder):
    """A finder that precedes Python's own finders, which would import a folder of that name as a namespace package."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, inner = name.partition(".")
        if package not in PACKAGES or not os.path.exists(init := _init(package)):
            return None
        if inner:
            # If another package of that name has been imported, Python searches its __path__.
            if _imported_by_this_project():
                check_imported(package)
            return None
        found = PathFinder.find_spec(name)
        if found is not None and found.origin is not None and os.path.realpath(found.origin) != init:
            if _imported_by_this_project():
                raise _clash(package, found.origin, f"Python finds {found.origin} under that name first")
            return None
        return importlib.util.spec_from_file_location(name, init, submodule_search_locations=[os.path.dirname(init)])


def install_finder() -> None:
    """Install the finder as the first of sys.meta_path."""
    if not any(isinstance(finder, OwnPackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, OwnPackages())


def check_imported(module: str) -> None:
    """Raise PackageClash if another module has been imported under the name of the top-level package of `module`."""
    package = module.partition(".")[0]
    found = sys.modules.get(package)
    file = getattr(found, "__file__", None)
    if package in PACKAGES and found is not None and (file is None or os.path.realpath(file) != _init(package)):
        other = file or f"another module '{package}'"
        raise _clash(package, other, f"{other} has been imported under that name")


def require(package: str) -> None:
    """Import a package now, so that a PackageClash is raised before long work starts."""
    check_imported(package)
    importlib.import_module(package)


def _init(package: str) -> str:
    return os.path.join(HOME, package, "__init__.py")


def _clash(package: str, file: str, found: str) -> PackageClash:
    return PackageClash(
        f"retriever needs its own package '{package}' ({_init(package)}), but {found}: rename {file}, or start where "
        f"it is not on Python's path (the commands `retriever` and `python -m retriever` do not look in the working "
        f"directory)",
        name=package,
    )


def _imported_by_this_project() -> bool:
    """Whether the import that is being resolved is in code of the four packages."""
    frame = sys._getframe(1)
    # Skip the frames of this file and of Python's import system.
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__
        or frame.f_globals.get("__name__", "").split(".")[0] in ("importlib", "_frozen_importlib")
    ):
        frame = frame.f_back
    importer = os.path.realpath(frame.f_globals.get("__file__") or "")
    return any(importer.startswith(os.path.join(HOME, package, "")) for package in ("retriever", *PACKAGES))
