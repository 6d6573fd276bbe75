"""Processes that make windows: how many, and that they end with whoever asked for these, however that ends."""

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

# Windows larger than a pipe, of a corpus that takes its time before the row asked for.
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

maker = WindowBuilder(TextTokenizer(AutoTokenizer.from_pretrained(sys.argv[1]), 32), "", "store")
windows = corpus_windows(corpus(), int(sys.argv[2]), WindowSchedule(65536, 1000, 8), maker, int(sys.argv[3]))
try:
    print("begun", flush=True)
    print(len(next(windows)), flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    windows.close()
    print("interrupted", flush=True)
"""


def begun(minilm: str, row: int, workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, minilm, str(row), str(workers)], stdout=subprocess.PIPE, text=True
    )


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_workers_end_when_their_parent_is_killed(minilm: str) -> None:
    process = begun(minilm, 0, 2)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n" and process.stdout.readline() == "1000\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    # Both have more to hand over than goes into a pipe.
    time.sleep(1)
    process.kill()
    process.wait()
    wait_until(lambda: not any(child.is_running() for child in children))


@pytest.mark.parametrize("workers", [0, 2])
def test_on_the_way_to_a_far_row_one_can_be_interrupted(minilm: str, workers: int) -> None:
    process = begun(minilm, 10**6, workers)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    wait_until(lambda: len(psutil.Process(process.pid).children(recursive=True)) == workers)
    time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n" and process.wait(timeout=30) == 0
    assert not any(child.is_running() for child in children)


def test_random_numbers_of_the_caller_are_left_alone_and_nothing_is_said(minilm: str) -> None:
    def corpus() -> Iterator[Passage]:
        yield from (Passage(str(number), "", "word") for number in range(10))

    maker = WindowBuilder(TextTokenizer(AutoTokenizer.from_pretrained(minilm), 32), "", "store")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # More than there are windows, and than processors.
        made = list(corpus_windows(corpus(), 3, WindowSchedule(100, 4, 8), maker, 5))
    assert torch.equal(torch.rand(1), expected)
    assert [window.ids for window in made] == [["3", "4", "5", "6"], ["7", "8", "9"]]


@pytest.mark.parametrize(
    ("processors", "device", "workers"),
    [(64, "cuda", 12), (14, "cuda", 10), (10, "cuda", 0), (2, "cuda", 0), (64, "cpu", 0)],
)
def test_a_gpu_gets_as_many_as_it_needs_and_the_machine_has_processors_for(
    processors: int, device: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(processors)), raising=False)
    assert workers_for(torch.device(device)) == workers
