"""Script `peak_of_training.py CONFIG`, also under torchrun: train, and print the peak memory of rank 0 in bytes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from retriever.cli.terminal import Terminal
from retriever.config.yaml_file import load_config
from retriever.distributed.context import joined_ranks
from retriever.training.trainer import Trainer

torch.set_num_threads(1)
with joined_ranks(on_devices=torch.cuda.is_available()) as ranks:
    Trainer.start(load_config(Path(sys.argv[1])), Terminal(), ranks).train()
    if ranks.is_first and torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated())
    elif ranks.is_first:
        # Not getrusage: on Linux a program inherits the peak of the process that started it.
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        print(int(peak) * 1024)
