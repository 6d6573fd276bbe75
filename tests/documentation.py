"""Code blocks of the documentation: reading them, running them, and checking those that cannot run here."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from forks import LoadedPython

from retriever.cli import command_line

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"```(\w*)(?: title=\"([^\"]+)\")?$")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->$")
# Scripts that pass their arguments to `retriever train`.
LAUNCHERS = ("scripts/launch/one_node.sh", "scripts/launch/several_nodes.sh", "scripts/launch/slurm.sbatch")


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        place: File and line of its first line.
        language: Language after the fence.
        title: Name of the file that it shows; "" if it is to be run.
        code: The lines between the fences.
        reason: Why it cannot run in a test; "" if it can.
    """

    place: str
    language: str
    title: str
    code: str
    reason: str


def blocks_of(page: Path) -> list[Block]:
    """The code blocks of a Markdown file, in order."""
    blocks: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    reason, start, info = "", 0, None
    for number, line in enumerate(lines, start=1):
        if info is None:
            if found := FENCE.match(line):
                start, info = number, found
            elif line.startswith("```"):
                raise ValueError(f"{page}:{number}: expected a language and at most a title after the fence")
            elif line.strip():
                marker = NOT_RUN.match(line)
                reason = marker[1] if marker else ""
        elif line == "```":
            code = "\n".join(lines[start : number - 1]) + "\n"
            blocks.append(Block(f"{page.relative_to(ROOT)}:{start + 1}", info[1], info[2] or "", code, reason))
            reason, info = "", None
    return blocks


def run_page(blocks: list[Block], python: LoadedPython) -> None:
    """Run the blocks of a page in the working directory, as a reader would."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        try:
            if block.title:
                check_syntax(block)
                Path(block.title).write_text(block.code, encoding="utf-8")
            elif block.reason or block.language not in ("bash", "python"):
                check(block)
            elif block.language == "python":
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(block.code, block.place, "exec"), namespace)
            else:
                for words in commands_of(block):
                    run(words, python)
        except BaseException as error:
            error.add_note(f"in the block at {block.place}")
            raise


def check(block: Block) -> None:
    """Check a block without running it: syntax, scripts that it calls, and the flags of its `retriever` commands."""
    check_syntax(block)
    if block.language == "bash":
        for words in commands_of(block):
            check_command(words)


def check_syntax(block: Block) -> None:
    """Parse a block.

    Raises:
        ValueError: The language is unknown.
    """
    if block.language == "python":
        compile(block.code, block.place, "exec")
    elif block.language == "json":
        for line in block.code.splitlines():
            json.loads(line)
    elif block.language == "yaml":
        yaml.safe_load(block.code)
    elif block.language not in ("bash", ""):
        raise ValueError(f"{block.place}: expected bash, python, json, yaml or no language, found {block.language}")


def commands_of(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run(words: list[str], python: LoadedPython) -> None:
    """Run `retriever`, `python` or `torchrun` in the working directory, the last two in processes of their own."""
    if words[0] == "retriever":
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command_line.main(words[1:])
        assert code == 0, f"{shlex.join(words)}: exit code {code}\n{err.getvalue()}"
        return
    programs = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}
    done = python.run(*programs[words[0]], *words[1:], folder=Path.cwd())
    assert done.returncode == 0, f"{shlex.join(words)}: exit code {done.returncode}\n{done.stderr[-3000:]}"


def check_command(words: list[str]) -> None:
    """Check that the scripts of a command exist, and that `retriever` accepts its arguments."""
    for word in words:
        assert not word.startswith("scripts/") or (ROOT / word).exists(), f"{word}: no such file"
    if arguments := arguments_of(words):
        command_line._parse(arguments)


def arguments_of(words: list[str]) -> list[str]:
    """The arguments of `retriever` in a command that may start it through torchrun or a launch script."""
    for place, word in enumerate(words):
        if word == "retriever" and (place == 0 or words[place - 1] == "-m"):
            return words[place + 1 :]
        if word in LAUNCHERS:
            return ["train", *words[place + 1 :]]
    return []
