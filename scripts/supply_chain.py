"""List the licenses and versions of the required packages, their advisories, and check that the wheel is built twice
alike.

    python scripts/supply_chain.py [--extra NAME ...] [--advisories] [--wheel]

Advisories are those of OSV (https://osv.dev), which needs a network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OSV = "https://api.osv.dev/v1/querybatch"


def required(name: str, extras: set[str], found: dict[str, metadata.Distribution]) -> None:
    """Add a package and all that it requires, as far as it is installed."""
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return
    found[re.sub(r"[-_.]+", "-", name).lower()] = package
    for line in package.requires or ():
        wanted = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        assert wanted is not None
        key = re.sub(r"[-_.]+", "-", wanted[0]).lower()
        if key not in found and (extra is None or extra[1] in extras):
            required(wanted[0], set(), found)


def license(package: metadata.Distribution) -> str:
    """Return the license of a package: the SPDX expression, the classifiers, or the first line of the field."""
    classifiers = [
        line.rpartition(" :: ")[2] for line in package.metadata.get_all("Classifier", []) if "License ::" in line
    ]
    stated = (
        package.metadata.get("License-Expression") or ", ".join(classifiers) or package.metadata.get("License") or ""
    )
    return (stated.strip().splitlines() or ["not stated"])[0][:60]


def wheel_sha256() -> tuple[str, str]:
    """Build the wheel in a new folder. Returns its name and sha256."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            str(ROOT),
            "--no-deps",
            "--no-build-isolation",
            "-q",
            "-w",
            folder,
        ]
        subprocess.run(words, check=True, env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"})
        (wheel,) = Path(folder).glob("*.whl")
        return wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest()


def advisories(packages: Mapping[str, str], url: str = OSV) -> dict[str, list[str]]:
    """Return the identifiers of the known advisories of packages, by name and version, of those that have any.

    Raises:
        OSError: the service cannot be reached, or answers with something else.
    """
    queries = [
        {"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in packages.items()
    ]
    request = urllib.request.Request(url, json.dumps({"queries": queries}).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        try:
            results = json.load(answer)["results"]
            found = [[each["id"] for each in result.get("vulns", ())] for result in results]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise OSError(f"expected the answer of OSV, found: {error!r:.100}") from None
    if len(found) != len(packages):
        raise OSError(f"expected {len(packages)} results, found {len(found)}")
    return {name: ids for name, ids in zip(packages, found, strict=True) if ids}


def main() -> int:
    """Print the table; the exit code is 1 if there are advisories or two builds of the wheel differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--extra", action="append", default=[], help="include the packages of an extra; may be repeated"
    )
    parser.add_argument("--advisories", action="store_true", help="ask OSV for known advisories")
    parser.add_argument("--wheel", action="store_true", help="build the wheel twice and compare")
    arguments = parser.parse_args()
    found: dict[str, metadata.Distribution] = {}
    import configparser

    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    lines = options["options"]["install_requires"].split()
    lines += [line for extra in arguments.extra for line in options["options.extras_require"][extra].split()]
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        if name is not None and name[0] != "dense-retriever":
            required(name[0], set(), found)
    for name, package in sorted(found.items()):
        print(f"{name}\t{package.version}\t{license(package)}")
    known: dict[str, list[str]] = {}
    if arguments.advisories:
        try:
            known = advisories({name: package.version.partition("+")[0] for name, package in found.items()})
        except OSError as error:
            print(f"supply_chain: {OSV}: cannot be asked for advisories: {error}", file=sys.stderr)
            return 1
        print(f"{len(known)} of {len(found)} packages have advisories")
        for name, ids in known.items():
            print(f"{name}\t{', '.join(ids)}")
    if not arguments.wheel:
        return 1 if known else 0
    one, other = wheel_sha256(), wheel_sha256()
    print(f"{one[0]}\t{one[1]}\t{'the same twice' if one == other else f'differs: {other[1]}'}")
    return 0 if one == other and not known else 1


if __name__ == "__main__":
    sys.exit(main())
