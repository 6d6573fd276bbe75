"""Runs as `peak_of_training.py CONFIG`: trains, and prints the most memory that this process ever had, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from retriever.config import load_config
from retriever.progress import Terminal
from retriever.trainer import Trainer

torch.set_num_threads(1)
Trainer.start(load_config(Path(sys.argv[1])), Terminal()).train()
if torch.cuda.is_available():
    print(torch.cuda.max_memory_allocated())
else:
    # KiB on Linux.
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
