"""Items made ahead come in order, errors where they are taken, and a closed iterator ends its thread."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest

from retriever.ahead import ahead, giving_way


def test_items_come_in_order_and_are_made_before_they_are_taken() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            yield number

    taken = ahead(items(), depth=2)
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

    taken = ahead(items())
    assert next(taken) == 1
    with pytest.raises(error, match="torn"):
        next(taken)


def test_closing_ends_the_thread_of_endless_items() -> None:
    before = threading.active_count()
    endless = ahead(iter(int, 1), depth=1)
    next(endless)
    endless.close()
    assert threading.active_count() == before


def test_threads_give_way_until_the_work_ends_however_it_ends() -> None:
    usual = sys.getswitchinterval()
    with pytest.raises(KeyError), giving_way():
        assert sys.getswitchinterval() <= 1e-4
        raise KeyError
    assert sys.getswitchinterval() == usual
