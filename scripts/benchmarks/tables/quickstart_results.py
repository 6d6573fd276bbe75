"""What the README shows of a quickstart: its table and the picture of its report, which must be of one run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.benchmarks.tables import readme_tables

# Of the picture, in pixels: as much of the report as has its tables and first plots.
WIDTH, HEIGHT = 1000, 1305
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str:
    """The program that takes the picture; without one the script ends here, before anything was run."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        sys.exit("--keep: expected chromium to take the picture of the report (Debian: apt-get install chromium)")
    return found


def keep(report: Path, browser: str) -> None:
    """Put table and picture of the folder `report` in the place of the committed ones, and the table in README.md."""
    results = readme_tables.RESULTS
    picture = report / "quickstart_report.png"
    take_picture(report / "report.html", picture, browser)
    for path in (report / "quickstart.csv", picture):
        shutil.copyfile(path, results / path.name)
    readme_tables.main()


def take_picture(page: Path, picture: Path, browser: str) -> None:
    """Write the beginning of an HTML page as a PNG."""
    picture.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        words = [browser, "--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        # Root has no sandbox to give.
        words += ["--no-sandbox"] if os.geteuid() == 0 else []
        words += [f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture.resolve()}"]
        words.append(page.resolve().as_uri())
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or not picture.exists():
        sys.exit(f"{browser}: expected a picture of {page}, found: {done.stderr.strip()[-500:]}")
