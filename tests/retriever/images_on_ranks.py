"""Script `images_on_ranks.py CONFIG`: train on images with 1 and 3 processes and compare."""

from __future__ import annotations

import sys
from pathlib import Path

from forks import on_ranks
from run_helpers import assert_near, results
from train_on_ranks import trained


def main(config: str) -> None:
    """Compare runs without and with a locked image tower."""
    for name, more in (("pixels", ()), ("features", ("--model.image.lock", "image"))):
        for size in (1, 3):
            on_ranks(size, trained(config, Path("runs") / f"{name}{size}", *more))
        assert_near(results(Path("runs") / f"{name}3"), results(Path("runs") / f"{name}1"))
        print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
