"""The time of a benchmark of many training runs: an estimate, what is left after each run, and a limit."""

from __future__ import annotations

import time

# Pairs per second of training from MiniLM on WordNet (scripts/results/whole_train.csv), and seconds of the rest of a
# run: its start, the evaluation on all headwords, and the saved model. "cpu" is for 2 cores.
SPEED = {"cuda": 70_000, "cpu": 15}
REST = {"cuda": 8.0, "cpu": 30.0}


class Budget:
    """Counts the runs of a benchmark and says how long the others will take.

    Args:
        seconds: Time after which no run begins that would probably end later.
        runs: Number of runs.
        pairs: Pairs of a training run, its batch size times its steps.
        device: Device of the runs.
    """

    def __init__(self, seconds: float, runs: int, pairs: int, device: str) -> None:
        kind = device.partition(":")[0]
        self._seconds, self._runs, self._done = seconds, runs, 0
        self._begun = time.perf_counter()
        self._each = pairs / SPEED[kind] + REST[kind]
        print(f"{runs} runs of {pairs:,} pairs: about {runs * self._each:,.0f} s", flush=True)

    def allows(self, name: str) -> bool:
        """Whether the next run would end in time; says so if not."""
        spent = time.perf_counter() - self._begun
        if spent + self._each <= self._seconds:
            return True
        print(f"stopped after {spent:.0f} s, before {name}: repeat the command for what is left", flush=True)
        return False

    def count(self, message: str) -> None:
        """Count a run, and print a message and the time of the runs that are left."""
        self._done += 1
        self._each = (time.perf_counter() - self._begun) / self._done
        left = self._runs - self._done
        print(f"{message} ({self._done} of {self._runs}, about {left * self._each:,.0f} s left)", flush=True)
