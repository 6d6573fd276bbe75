"""Prefetched items and background calls keep their order, their errors are raised, and their threads end."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from retriever.utils.prefetch import background_calls, prefetch, short_switch_interval


def test_items_keep_their_order_and_are_computed_in_advance() -> None:
    computed: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            computed.append(number)
            yield number

    prefetched = prefetch(items(), depth=2)
    assert next(prefetched) == 0
    until = time.monotonic() + 10
    while len(computed) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(computed) >= 3
    assert list(prefetched) == [1, 2, 3, 4]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_is_raised_after_the_items_before_it(error: type[BaseException]) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise error("torn")

    prefetched = prefetch(items())
    assert next(prefetched) == 1
    with pytest.raises(error, match="torn"):
        next(prefetched)


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    endless = prefetch(iter(int, 1), depth=1)
    next(endless)
    endless.close()
    assert threading.active_count() == before


def test_the_switch_interval_is_restored_after_an_error() -> None:
    default = sys.getswitchinterval()
    with pytest.raises(KeyError), short_switch_interval():
        assert sys.getswitchinterval() <= 1e-4
        raise KeyError
    assert sys.getswitchinterval() == default


def test_background_calls_keep_their_order_and_finish() -> None:
    computed: list[int] = []
    main = threading.current_thread()

    def call(number: int) -> None:
        assert threading.current_thread() is not main
        time.sleep(0.01 * (number % 2))
        computed.append(number)

    with background_calls(call, 2) as submit:
        for number in range(9):
            submit(number)
            assert number - len(computed) <= 3
    assert computed == list(range(9))


def test_an_error_of_a_background_call_is_raised_and_later_calls_are_dropped() -> None:
    computed: list[int] = []

    def call(number: int) -> None:
        if number == 2:
            raise OSError("full")
        computed.append(number)

    with pytest.raises(OSError, match="full"), background_calls(call, 2) as submit:
        for number in range(3):
            submit(number)
    assert computed == [0, 1]
    with pytest.raises(OSError, match="full"), background_calls(call, 1) as submit:
        for number in itertools.count():
            submit(number)
    assert computed == [0, 1, 0, 1]


@pytest.mark.parametrize("abandon", [False, True])
def test_an_error_of_the_body_waits_for_calls_unless_abandoned(abandon: bool) -> None:
    running, proceed, computed = threading.Event(), threading.Event(), list[int]()

    def call(number: int) -> None:
        running.set()
        assert proceed.wait(10)
        computed.append(number)

    def body() -> None:
        with background_calls(call, 2, abandon=abandon) as submit:
            submit(0)
            submit(1)
            assert running.wait(10)
            if not abandon:
                threading.Timer(0.1, proceed.set).start()
            raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        body()
    assert computed == ([] if abandon else [0, 1])
    proceed.set()


def test_an_abandoned_call_does_not_block_exit() -> None:
    script = """
import time
from retriever.utils.prefetch import background_calls
with background_calls(time.sleep, 2, abandon=True) as submit:
    submit(600)
    raise ValueError("torn")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ValueError: torn")
