"""Shows a quickstart run in README.md: its table, and a screenshot of its report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts import RESULTS
from scripts.benchmarks.tables import readme_tables

# Pixels of the screenshot, which shows the tables and the first plots.
WIDTH, HEIGHT = 1000, 1305
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str:
    """Path of Chromium. Exits if there is none, before anything is run."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        sys.exit(
            "--keep: expected chromium, which takes the screenshot of the report (Debian: apt-get install chromium)"
        )
    return found


def keep(report: Path, browser: str) -> None:
    """Replace the committed table and screenshot by those of the folder `report`, and write README.md."""
    image = report / "quickstart_report.png"
    take_screenshot(report / "report.html", image, browser)
    for path in (report / "quickstart.csv", image):
        shutil.copyfile(path, RESULTS / path.name)
    readme_tables.main()


def take_screenshot(page: Path, image: Path, browser: str) -> None:
    """Write the top of an HTML page as a PNG."""
    image.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        words = [browser, "--headless=new", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        # Chromium refuses to run its sandbox as root.
        words += ["--no-sandbox"] if os.geteuid() == 0 else []
        words += [f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={image.resolve()}"]
        words.append(page.resolve().as_uri())
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode or not image.exists():
        sys.exit(f"{browser}: expected a screenshot of {page}, found: {done.stderr.strip()[-500:]}")
