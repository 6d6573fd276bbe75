"""Script `killed_runs.py CONFIG PART …`: kill a training run after fractions of its file operations, and resume it.

Prints each fraction after which the resumed run is bitwise equal to an uninterrupted one, and fails at the first other.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run_helpers import assert_same, results

from retriever.cli.terminal import Terminal
from retriever.config.yaml_file import load_config
from retriever.training.trainer import Trainer


def forked(run: Callable[[], object], kill_at: int = 0) -> int:
    """Call `run` in a fork that gets SIGKILL at its n-th file operation. Returns the exit status.

    A fork that is not killed writes the number of its operations to the file `count`.
    """
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    operations = 0
    try:
        for name in ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir"):
            real = getattr(os, name)

            def counted(*arguments: Any, real: Any = real, **options: Any) -> Any:
                nonlocal operations
                operations += 1
                if operations == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            setattr(os, name, counted)
        run()
        Path("count").write_text(str(operations))
        os._exit(0)
    finally:
        os._exit(1)


def main(config_file: str, parts: list[str]) -> None:
    """Test every fraction."""
    config = load_config(Path(config_file))
    whole = Path("whole")
    assert forked(lambda: Trainer.start(dataclasses.replace(config, out=str(whole)), Terminal()).train()) == 0
    changes = int(Path("count").read_text())
    run = Path("run")

    def start() -> None:
        Trainer.start(dataclasses.replace(config, out=str(run)), Terminal()).train()

    def resume() -> None:
        Trainer.resume(run, Terminal()).train() if (run / "config.yaml").exists() else start()

    for part in parts:
        shutil.rmtree(run, ignore_errors=True)
        assert forked(start, round(float(part) * changes)) == signal.SIGKILL
        assert forked(resume) == 0
        assert_same(results(run), results(whole))
        assert not [path for path in run.rglob(".*") if path.name != ".gitattributes"]
        print(part, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
