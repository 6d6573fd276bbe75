"""Run scripts and ranks in forks of a process that has imported the libraries, because importing them is slow.

As a script, `forks.py MODULE …` is the process of `LoadedPython`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Modules that training imports late.
LIBRARIES = (
    "index.exact.search",
    "retriever.training.trainer",
    "sentence_transformers.sentence_transformer.modules",
    "torch.distributed.run",
    "torch.profiler",
    "transformers.models.bert.modeling_bert",
    "tyro",
)


def environment() -> dict[str, str]:
    """Return environment variables for a process that forks: a single OpenMP thread, because threads break forks."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def torchrun(size: int, *words: object, restarts: int = 0, interval: float = 0.1) -> list[str]:
    """Return the arguments of Python for torchrun with `size` processes on this machine.

    torchrun looks for ended processes every `interval` seconds.
    """
    alone = ("--standalone", f"--nproc-per-node={size}", f"--max-restarts={restarts}", f"--monitor-interval={interval}")
    return ["-m", "torch.distributed.run", *alone, *map(str, words)]


class LoadedPython:
    """A Python process that has imported modules. Each `run`, and each process of torchrun in it, is a fork of it.

    Use it as a context manager. It sees no GPU.
    """

    def __init__(self, *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "forks.py"), *modules],
            env=environment() | {"CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> LoadedPython:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def run(self, *words: object, folder: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run `python WORDS` in the folder."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as output:
            out, err = Path(output) / "out", Path(output) / "err"
            request = {"words": [*map(str, words)], "folder": str(folder or "."), "out": str(out), "err": str(err)}
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                os.killpg(self._process.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired([*map(str, words)], timeout, out.read_text(), err.read_text())
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess([*map(str, words)], code, out.read_text(), err.read_text())


def on_ranks(size: int, run: Callable[[], object]) -> None:
    """Run a function in `size` forks of this process, as ranks under torchrun. A failure ends all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    left = set()
    for rank in range(size):
        child = os.fork()
        if not child:
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "RANK": rank}
            os.environ.update({name: str(value) for name, value in shared.items()})
            _end_with(run)
        left.add(child)
    while left:
        child, status = os.waitpid(-1, 0)
        left.remove(child)
        if status:
            for other in left:
                os.kill(other, signal.SIGKILL)
        assert not status, f"a process of {size} ended with {os.waitstatus_to_exitcode(status)}"


def _end_with(run: Callable[[], object]) -> None:
    """Run a function and exit as Python does."""
    code: Any = 1
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except Exception:  # noqa: BLE001 - printed as Python does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _python(words: list[str]) -> None:
    """Run what `python WORDS` runs."""
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def _worker(*words: str) -> None:
    """Run the process of a rank that torchrun starts."""
    # The fork has inherited the signal handlers of torchrun's agent.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _python([word for word in words if word != "-u"])


def run_and_exit(words: list[str]) -> None:
    """Run what `python WORDS` runs, and exit as it does."""
    _end_with(lambda: _python(words))


def ranks_are_forks() -> None:
    """Let torchrun start its ranks as forks of this process."""
    from torch.distributed.launcher import api

    launch = api.elastic_launch

    def launch_forks(config: Any, entrypoint: str) -> Any:
        config.start_method = "fork"
        return launch(config, _worker)

    api.elastic_launch = launch_forks


def _answer(request: dict[str, Any]) -> None:
    """Run a request, in a fork."""
    ranks_are_forks()
    for file, descriptor in ((os.devnull, 0), (request["out"], 1), (request["err"], 2)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), descriptor)
    os.chdir(request["folder"])
    run_and_exit(request["words"])


def main(modules: list[str]) -> None:
    """Import the modules, then run each request from standard input in a fork and print its exit code."""
    for module in modules:
        importlib.import_module(module)
    # Loaded objects need not be searched by every garbage collection in a fork.
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _answer(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
