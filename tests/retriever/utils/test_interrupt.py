"""Signals: several are one request to stop, an ignored one stays ignored, and none is lost in a callback."""

from __future__ import annotations

import gc
import os
import signal
import time

import pytest

from retriever.utils import interrupt
from retriever.utils.interrupt import Interrupted, StopRequest, sigterm_as_interrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_repeated_signals_are_one_request(number: signal.Signals) -> None:
    # Under nohup, where a test runner may have been started, hangups are ignored, and StopRequest leaves it so.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with StopRequest() as stop:
            for _ in range(5):
                os.kill(os.getpid(), number)
                # Ctrl-C and the signals that torchrun passes on arrive within seconds of each other.
                os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(Interrupted, match=number.name):
                stop.check()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_second_control_c_some_seconds_later_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "SAME_REQUEST", -1.0)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with sigterm_as_interrupt(), StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_within_a_callback_that_cannot_raise_is_raised_after_it() -> None:
    class Deleted:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(100):
                pass

    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        Deleted()
        gc.collect()
        time.sleep(5)
