"""When one rank of several fails: its error is the one that is shown, and the others end by themselves."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch import distributed

from index.files import InputError

_KEY = "first error"
# Between two looks at what other ranks report, and until one that ends because of another's error does so: torchrun
# ends all processes as soon as one has, and the first error must be on the screen by then.
_SECONDS, _PAUSE = 1.0, 2.0


class LostRankError(InputError):
    """A rank is gone without a word: killed, or its machine is. No fault of the program, so one line is enough."""


class AllRanksError(InputError):
    """An error that every rank finds and raises by itself, so that each of them shows it."""


@contextlib.contextmanager
def report_first_error(store: Any) -> Iterator[None]:
    """Within, the first error of any rank, or the first signal that ends one, passes through on that rank; the others
    exit with code 1 and say nothing. A CommonError passes through on every rank.

    A rank that is caught in a transfer with one that failed is ended from a thread, within seconds.

    Args:
        store: of the process group.

    Raises:
        LostRankError: another rank has gone, and no rank has reported an error.
    """
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(store.clone(), done), daemon=True)
    watch.start()
    try:
        try:
            yield
        except AllRanksError:
            # Nothing to tell the others; the store may be gone with the first of them to end.
            done.set()
            _ignore_sigterm()
            raise
        except Exception as error:
            done.set()
            if not _claim(store):
                time.sleep(_PAUSE)
                raise _silent_end() from None
            if isinstance(error, distributed.DistError) or (type(error) is RuntimeError and _is_of_transfer(error)):
                first = (str(error).splitlines() or [""])[0]
                raise LostRankError(f"another process of this job is gone, killed perhaps: {first}") from error
            raise
        finally:
            done.set()
            watch.join()
    except KeyboardInterrupt:
        # torchrun's SIGTERM, if another failed; it may come while this rank deals with its own error. If it came to
        # this rank alone, the others must not wait for it.
        if not _claim(store):
            raise _silent_end() from None
        raise


def _silent_end() -> SystemExit:
    """What ends a rank because of another's error; from here on torchrun's SIGTERM changes nothing."""
    _ignore_sigterm()
    return SystemExit(1)


def _ignore_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _claim(store: Any) -> bool:
    """Whether no rank has failed before. The store may be gone with the process that kept it."""
    try:
        return store.add(_KEY, 1) == 1
    except (RuntimeError, distributed.DistError):
        return True


def _watch(store: Any, done: threading.Event) -> None:
    while not done.wait(_SECONDS):
        try:
            reported = store.check([_KEY])
        except (RuntimeError, distributed.DistError):
            # The process that kept it is gone: whoever exchanges with that one will notice.
            return
        if reported and not done.wait(_PAUSE + _SECONDS):
            os._exit(1)


def _is_of_transfer(error: RuntimeError) -> bool:
    return any(word in str(error) for word in ("gloo", "NCCL", "Connection", "recv", "Broken pipe"))
