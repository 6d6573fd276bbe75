"""Install the oldest and the newest allowed versions of the requirements, each in an environment of its own, and test
them.

    python scripts/compatibility.py [--python 3.11 3.12] [--versions oldest newest] [--work FOLDER]

The oldest versions are all lower bounds of setup.cfg at once, the newest are those that pip finds, with torch at most
the version of constraints.txt. Only wheels are installed. On Linux a wheel of torch may bring CUDA: an environment
takes up to 7 GB, and is removed before the next one is made.
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12")
SHOWN = ("torch", "transformers", "sentence-transformers", "faiss-cpu", "numpy")
# The extras that the tests need. Their lower bounds are installed as well.
EXTRAS = ("bm25", "gpu", "hub", "lora", "plot", "serve")
TOOLS = ("hypothesis", "pytest", "pytest-timeout", "pytrec_eval-terrier")
TESTS = (
    # Artefacts of earlier versions; train, encode, index, search and evaluate in one test.
    "tests/formats",
    "tests/retriever/test_public_api.py",
    # What depends on the libraries' interfaces: transformers, sentence-transformers, torch, faiss, pyarrow, starlette,
    # tyro and rich.
    "tests/retriever/models/packed/test_families.py",
    "tests/retriever/sentence_transformers",
    "tests/losses/test_inf_cl.py",
    "tests/index/test_faiss_index.py",
    "tests/index/test_record_files.py",
    "tests/retriever/data/test_data_sources.py",
    "tests/retriever/serve/test_serve.py",
    "tests/retriever/config",
    "tests/retriever/cli/test_help_texts.py",
)


@dataclass(frozen=True)
class Result:
    """How the tests of one environment ended."""

    python: str
    versions: str
    installed: dict[str, str]
    """Versions of the packages in `SHOWN`, without those that are not installed."""
    outcome: str
    passed: bool


def requirements(extras: tuple[str, ...] = EXTRAS) -> dict[str, str]:
    """Return the lower bound of each package that setup.cfg requires, by name.

    Raises:
        ValueError: a requirement has no lower bound, or something beside it.
    """
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = options["options"]["install_requires"].split()
    lines += [line for extra in extras for line in options["options.extras_require"][extra].split()]
    found = {}
    for line in lines:
        bound = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", line)
        if bound is None:
            raise ValueError(f"setup.cfg: expected NAME>=VERSION, found {line!r}")
        found[bound[1]] = bound[2]
    return found


def constraints(versions: str) -> list[str]:
    """Return the lines of a constraints file for the oldest or newest versions."""
    if versions == "oldest":
        return [f"{name}=={version}" for name, version in requirements().items()]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return [f"torch<={pinned['torch']}"]


def find_python(version: str) -> str | None:
    """Return a working `pythonVERSION` of PATH or of pyenv, or None. Shims of pyenv may exist without a Python."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders += [str(folder) for folder in sorted(pyenv.glob(f"versions/{version}.*/bin"))]
    for folder in folders:
        python = shutil.which(f"python{version}", path=folder)
        if python is not None and _version(python) == version:
            return python
    return None


def _version(python: str) -> str | None:
    words = [python, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def run_tests(version: str, versions: str, work: Path) -> Result:
    """Make an environment in the folder, install, and run the tests; their output is in a file beside it."""
    name = f"python{version}-{versions}"
    python = find_python(version)
    if python is None:
        return Result(version, versions, {}, f"not tested: no working python{version} found", False)
    environment, log = work / name, work / f"{name}.log"
    inside = environment / "bin" / "python"
    limits = work / f"{name}.txt"
    limits.write_text("\n".join(constraints(versions)) + "\n")
    words = ["--only-binary", ":all:", "-c", str(limits), "-e", f"{ROOT}[{','.join(EXTRAS)}]", *TOOLS]
    steps = {
        "venv": [python, "-m", "venv", "--clear", str(environment)],
        "installation": [str(inside), "-m", "pip", "install", "--quiet", "--no-compile", *words],
        "tests": [str(inside), "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
    }
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables["HF_HUB_OFFLINE"] = "1"
    installed: dict[str, str] = {}
    with log.open("w") as output:
        for step, line in steps.items():
            print(f"{name}: {step}", file=sys.stderr, flush=True)
            code = subprocess.run(line, cwd=ROOT, env=variables, stdout=output, stderr=output, check=False).returncode
            if code and step != "tests":
                return Result(version, versions, installed, f"{step} failed, see {log}", False)
            if step == "installation":
                installed = _installed(inside)
    lines = log.read_text(errors="replace").strip().splitlines()
    # Libraries may print remarks as Python ends, after pytest's closing line.
    closing = next((line for line in reversed(lines) if re.search(r" in [\d.]+s\b", line)), lines[-1]).strip("= ")
    return Result(version, versions, installed, closing if not code else f"{closing}, see {log}", not code)


def _installed(python: Path) -> dict[str, str]:
    """Return the versions of the packages in `SHOWN` in an environment."""
    listed = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    found = dict(line.split("==") for line in listed.splitlines() if line.count("==") == 1)
    return {name: found[name] for name in SHOWN if name in found}


def table(results: list[Result]) -> str:
    """Return a Markdown table of the results."""
    rows = [["Python", "versions", *SHOWN, "result"], ["---"] * (len(SHOWN) + 3)]
    rows += [
        [each.python, each.versions, *(each.installed.get(name, "") for name in SHOWN), each.outcome]
        for each in results
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    """Test all environments and print the table; the exit code is 1 unless all tests passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION", help="default: 3.11 3.12")
    parser.add_argument(
        "--versions", nargs="+", default=["oldest", "newest"], choices=["oldest", "newest"], help="default: both"
    )
    parser.add_argument("--work", type=Path, help="keep the environments and the output of the tests in this folder")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="compatibility-"))
    work.mkdir(parents=True, exist_ok=True)
    results = []
    for version in arguments.python:
        for versions in arguments.versions:
            results.append(run_tests(version, versions, work.resolve()))
            if arguments.work is None:
                shutil.rmtree(work / f"python{version}-{versions}", ignore_errors=True)
    passed = all(result.passed for result in results)
    if passed and arguments.work is None:
        shutil.rmtree(work)
    print(table(results))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
