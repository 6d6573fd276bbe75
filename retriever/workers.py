"""What a data worker, a process forked from the trainer, leaves to it."""

from __future__ import annotations

import os
import signal


def become_worker(worker: int) -> None:
    """A DataLoader's worker_init_fn.

    Ctrl-C and a batch system's SIGTERM reach the whole process group, but it is the trainer that ends its workers; they
    end by themselves when it is gone. And a fork has none of the threads that tokenizers share out their texts among:
    where the trainer has used them, a worker would wait for them for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
