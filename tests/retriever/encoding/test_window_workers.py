"""Worker processes that build windows: their number, and that they exit with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import psutil
import pytest
import torch
from transformers import AutoTokenizer

from index.passages import Passage
from retriever.encoding.window_workers import corpus_windows, workers_for
from retriever.encoding.windows import WindowBuilder, WindowSchedule
from retriever.models.tokenizer import TextTokenizer

# Windows larger than a pipe's buffer, of a corpus that is slow up to the first row that is read.
SLOW = """
import sys, time
from transformers import AutoTokenizer
from index.passages import Passage
from retriever.encoding.windows import WindowSchedule, WindowBuilder
from retriever.models.tokenizer import TextTokenizer
from retriever.encoding.window_workers import corpus_windows

def corpus():
    for number in range(10**6):
        if number < int(sys.argv[2]):
            time.sleep(0.001)
        yield Passage(str(number), "", "word " * 100)

builder = WindowBuilder(TextTokenizer(AutoTokenizer.from_pretrained(sys.argv[1]), 32), "", "store")
windows = corpus_windows(corpus(), int(sys.argv[2]), WindowSchedule(65536, 1000, 8), builder, int(sys.argv[3]))
try:
    print("started", flush=True)
    print(len(next(windows)), flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    windows.close()
    print("interrupted", flush=True)
"""


def start(minilm: str, row: int, workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, minilm, str(row), str(workers)], stdout=subprocess.PIPE, text=True
    )


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_workers_exit_when_their_parent_is_killed(minilm: str) -> None:
    process = start(minilm, 0, 2)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n" and process.stdout.readline() == "1000\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    # Both workers wait until their full pipes are read.
    time.sleep(1)
    process.kill()
    process.wait()
    wait_until(lambda: not any(child.is_running() for child in children))


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_to_a_distant_row_can_be_interrupted(minilm: str, workers: int) -> None:
    process = start(minilm, 10**6, workers)
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    wait_until(lambda: len(psutil.Process(process.pid).children(recursive=True)) == workers)
    time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n" and process.wait(timeout=30) == 0
    assert not any(child.is_running() for child in children)


def test_workers_leave_the_random_state_unchanged_and_warn_of_nothing(minilm: str) -> None:
    def corpus() -> Iterator[Passage]:
        yield from (Passage(str(number), "", "word") for number in range(10))

    builder = WindowBuilder(TextTokenizer(AutoTokenizer.from_pretrained(minilm), 32), "", "store")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # More workers than windows and processors.
        windows = list(corpus_windows(corpus(), 3, WindowSchedule(100, 4, 8), builder, 5))
    assert torch.equal(torch.rand(1), expected)
    assert [window.ids for window in windows] == [["3", "4", "5", "6"], ["7", "8", "9"]]


@pytest.mark.parametrize(
    ("processors", "device", "workers"),
    [(64, "cuda", 12), (14, "cuda", 10), (10, "cuda", 0), (2, "cuda", 0), (64, "cpu", 0)],
)
def test_the_number_of_workers_depends_on_device_and_processors(
    processors: int, device: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(processors)), raising=False)
    assert workers_for(torch.device(device)) == workers
