"""If one rank fails, show its error only and end the other ranks."""

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
# Seconds between checks for errors of other ranks.
_CHECK_INTERVAL = 1.0
# Seconds before a rank exits because another one failed. torchrun ends all processes as soon as one has exited, and the
# first error must have been printed by then.
_EXIT_DELAY = 2.0


class LostRankError(InputError):
    """Another rank ended without reporting an error, for example because it was killed."""


class AllRanksError(InputError):
    """An error that all ranks raise at the same point, so that each may show it."""


@contextlib.contextmanager
def report_first_error(store: Any) -> Iterator[None]:
    """Context that lets only the first error of any rank propagate; the other ranks exit silently with code 1.

    A signal that ends a rank counts as an error. An AllRanksError propagates on every rank. A rank that is blocked in a
    collective with a failed rank is ended by a thread within seconds.

    Args:
        store: key-value store of the process group.

    Raises:
        LostRankError: a collective failed because another rank is gone, and no rank has reported an error.
    """
    done = threading.Event()
    watcher = threading.Thread(target=_exit_on_reported_error, args=(store.clone(), done), daemon=True)
    watcher.start()
    try:
        try:
            yield
        except AllRanksError:
            # The other ranks raise it, too. The store may disappear with the first process that exits.
            done.set()
            _ignore_sigterm()
            raise
        except Exception as error:
            done.set()
            if not _report(store):
                time.sleep(_EXIT_DELAY)
                raise _silent_exit() from None
            if isinstance(error, distributed.DistError) or (type(error) is RuntimeError and _is_connection_lost(error)):
                message = (str(error).splitlines() or [""])[0]
                raise LostRankError(f"another process of this job has ended, perhaps killed: {message}") from error
            raise
        finally:
            done.set()
            watcher.join()
    except KeyboardInterrupt:
        # SIGTERM from torchrun after another rank failed, possibly while this rank handles its own error. If only this
        # rank received the signal, reporting it ends the others, which would wait for this rank.
        if not _report(store):
            raise _silent_exit() from None
        raise


def _silent_exit() -> SystemExit:
    """Return the exit of a rank after another one failed, and ignore SIGTERM from torchrun from now on."""
    _ignore_sigterm()
    return SystemExit(1)


def _ignore_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _report(store: Any) -> bool:
    """Report an error to the other ranks. Returns whether it is the first, or whether the store is gone."""
    try:
        return store.add(_KEY, 1) == 1
    except (RuntimeError, distributed.DistError):
        return True


def _exit_on_reported_error(store: Any, done: threading.Event) -> None:
    while not done.wait(_CHECK_INTERVAL):
        try:
            reported = store.check([_KEY])
        except (RuntimeError, distributed.DistError):
            # The process that hosts the store is gone. Ranks that communicate with it get an error.
            return
        if reported and not done.wait(_EXIT_DELAY + _CHECK_INTERVAL):
            os._exit(1)


def _is_connection_lost(error: RuntimeError) -> bool:
    return any(word in str(error) for word in ("gloo", "NCCL", "Connection", "recv", "Broken pipe"))
