"""Script under torchrun, `failing_rank.py HOW ARGUMENTS…`: the command line, with rank 1 failing within a step.

HOW is "killed" or "error". After a restart nothing fails.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from index.files import InputError
from retriever.cli.command_line import main
from retriever.training import grad_cache

AT_CALL = 6


def failing(real: Any, how: str) -> Any:
    """Return `grad_cache.backward` with a failure in its sixth call, after the towers have run."""
    calls = 0

    def backward(encode: Any, micro_batches: Any, loss_of: Any, device: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1

        def fails(embeddings: Any) -> Any:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise InputError("words.jsonl: line 7: the disk says no")

        return real(encode, micro_batches, fails if calls == AT_CALL else loss_of, device, **options)

    return backward


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        grad_cache.backward = failing(grad_cache.backward, sys.argv[1])
    sys.exit(main(sys.argv[2:]))
