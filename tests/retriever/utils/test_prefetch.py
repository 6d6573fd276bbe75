"""Items made ahead and calls made behind keep their order, errors come where they are looked for, threads end."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from retriever.utils.prefetch import background_calls, prefetch, short_switch_interval


def test_items_come_in_order_and_are_made_before_they_are_taken() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    taken = prefetch(items(), depth=2)
    assert next(taken) == 0
    until = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(made) >= 3
    assert list(taken) == [1, 2, 3, 4]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_is_raised_after_the_items_before_it(error: type[BaseException]) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise error("torn")

    taken = prefetch(items())
    assert next(taken) == 1
    with pytest.raises(error, match="torn"):
        next(taken)


def test_closing_ends_the_thread_of_endless_items() -> None:
    before = threading.active_count()
    endless = prefetch(iter(int, 1), depth=1)
    next(endless)
    endless.close()
    assert threading.active_count() == before


def test_threads_give_way_until_the_work_ends_however_it_ends() -> None:
    usual = sys.getswitchinterval()
    with pytest.raises(KeyError), short_switch_interval():
        assert sys.getswitchinterval() <= 1e-4
        raise KeyError
    assert sys.getswitchinterval() == usual


def test_calls_behind_are_made_in_order_and_all_of_them_by_the_end() -> None:
    made: list[int] = []
    main = threading.current_thread()

    def call(number: int) -> None:
        assert threading.current_thread() is not main
        time.sleep(0.01 * (number % 2))
        made.append(number)

    with background_calls(call, 2) as later:
        for number in range(9):
            later(number)
            assert number - len(made) <= 3
    assert made == list(range(9))


def test_what_a_call_behind_raises_is_raised_and_ends_those_after_it() -> None:
    made: list[int] = []

    def call(number: int) -> None:
        if number == 2:
            raise OSError("full")
        made.append(number)

    with pytest.raises(OSError, match="full"), background_calls(call, 2) as later:
        for number in range(3):
            later(number)
    assert made == [0, 1]
    with pytest.raises(OSError, match="full"), background_calls(call, 1) as later:
        for number in itertools.count():
            later(number)
    assert made == [0, 1, 0, 1]


@pytest.mark.parametrize("abandon", [False, True])
def test_an_error_of_the_body_waits_for_calls_that_come_back(abandon: bool) -> None:
    begun, go_on, made = threading.Event(), threading.Event(), list[int]()

    def call(number: int) -> None:
        begun.set()
        assert go_on.wait(10)
        made.append(number)

    def body() -> None:
        with background_calls(call, 2, abandon=abandon) as later:
            later(0)
            later(1)
            assert begun.wait(10)
            if not abandon:
                threading.Timer(0.1, go_on.set).start()
            raise ValueError("torn")

    with pytest.raises(ValueError, match="torn"):
        body()
    assert made == ([] if abandon else [0, 1])
    go_on.set()


def test_a_call_that_was_abandoned_does_not_keep_the_program() -> None:
    script = """
import time
from retriever.utils.prefetch import background_calls
with background_calls(time.sleep, 2, abandon=True) as later:
    later(600)
    raise ValueError("torn")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ValueError: torn")
