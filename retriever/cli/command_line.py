"""The command line: parses the arguments, runs the command, and reports an error as one line and an exit code."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import arg, subcommand

from index.files import InputError, escape_control
from index.progress import Reporter
from retriever.cli.commands.duplicates import Duplicates
from retriever.cli.commands.encode import Encode
from retriever.cli.commands.evaluation.compare import EvaluateCompare, EvaluateRun
from retriever.cli.commands.evaluation.evaluate import EvaluateBeir
from retriever.cli.commands.evaluation.probe import EvaluateProbe
from retriever.cli.commands.evaluation.zero_shot import EvaluateZeroShot
from retriever.cli.commands.index import IndexBuild, IndexTune
from retriever.cli.commands.index_changes import IndexAdd, IndexDelete, IndexExport, IndexMerge, IndexVerify
from retriever.cli.commands.merge import Merge
from retriever.cli.commands.mine import Mine
from retriever.cli.commands.score import Score
from retriever.cli.commands.search import Search
from retriever.cli.commands.serve import Serve
from retriever.cli.commands.sharing.export import Export
from retriever.cli.commands.sharing.push import Push
from retriever.cli.commands.split import Split
from retriever.cli.commands.study import Study
from retriever.cli.commands.train import Train
from retriever.cli.help_text import joined_lines
from retriever.cli.terminal import Terminal
from retriever.config.flags import normalize_flags, with_limits_of_flags
from retriever.config.yaml_file import load_config
from retriever.errors import ArgumentError, ConfigError
from retriever.utils.interrupt import sigterm_as_interrupt
from retriever.utils.own_packages import PackageClash
from retriever.utils.torchrun import check_environment, world_size
from retriever.utils.versions import __version__

DESCRIPTION = (
    "Train dense retrieval models, embed and index a corpus, search it, measure how well it retrieves. "
    "`retriever --version` prints the version."
)

IndexCommand = (
    Annotated[IndexBuild, subcommand("build")]
    | Annotated[IndexExport, subcommand("export")]
    | Annotated[IndexVerify, subcommand("verify")]
    | Annotated[IndexTune, subcommand("tune")]
    | Annotated[IndexMerge, subcommand("merge")]
    | Annotated[IndexAdd, subcommand("add")]
    | Annotated[IndexDelete, subcommand("delete")]
)
EvaluateCommand = (
    Annotated[EvaluateBeir, subcommand("beir")]
    | Annotated[EvaluateZeroShot, subcommand("zero-shot")]
    | Annotated[EvaluateProbe, subcommand("probe")]
    | Annotated[EvaluateRun, subcommand("run")]
    | Annotated[EvaluateCompare, subcommand("compare")]
)

# Commands whose work the processes of torchrun share. With train --dry-run and evaluate beir --preflight, only the
# first process works. All other commands run in one process.
SHARED = (Train, Encode, EvaluateBeir, IndexBuild, Mine, Score)

# What Python, torch, oneDNN, Arrow and the loader of libraries say when there is no memory for a thread, a tensor, a
# kernel or a library.
OUT_OF_MEMORY = (
    "can't start new thread",
    "can't allocate memory",
    "could not create a primitive",
    "Failed to launch worker thread",
    "failed to map segment from shared object",
)

# Maximum number of characters of an error message.
MAX_MESSAGE = 1000


@dataclass(frozen=True)
class IndexGroup:
    """Build, tune, merge, change and verify indexes."""

    command: Annotated[IndexCommand, arg(name="")]

    def run(self, reporter: Reporter) -> int:
        return self.command.run(reporter)


@dataclass(frozen=True)
class EvaluateGroup:
    """Measure how well models and other programs retrieve."""

    command: Annotated[EvaluateCommand, arg(name="")]

    def run(self, reporter: Reporter) -> int:
        return self.command.run(reporter)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 done, 1 failed, 2 bad arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"retriever {__version__}")
        return 0
    # Pillow warns about damaged EXIF data, for example. What matters is in our own message, which names the image.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # Where bitsandbytes is installed, peft imports it, and it warns at every start that an optional kernel is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        command = _parse(arguments)
        _check_processes(command, arguments)
        with sigterm_as_interrupt(), Terminal() as terminal:
            code = command.run(terminal)
        # Flushed here, because an error at the exit of the interpreter could no longer be reported.
        sys.stdout.flush()
        return code
    except ArgumentError as error:
        # Names of other arguments in the message become flags, too. The value that was found is not changed.
        expected, found, value = error.problem.partition(", found ")
        problem = re.sub(r"\b[a-z]+(?:_[a-z]+)+\b", lambda name: _flag(name[0]), expected) + found + value
        return _fail(f"{_flag(error.argument)}: {problem}", 2)
    except ConfigError as error:
        return _fail(error, 2)
    except BrokenPipeError:
        # The program that reads our output (head, less) has ended. Without this, flushing the rest would fail again at
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, 1)
    except (InputError, PackageClash) as error:
        return _fail(error, 1)
    except UnicodeEncodeError as error:
        # Arguments and names of files may have any bytes; what is written is UTF-8.
        found = error.object[error.start : error.end]
        return _fail(f"expected text in UTF-8, found {found!a} after {error.object[: error.start][-40:]!a}", 1)
    except MemoryError:
        return _fail("out of memory", 1)
    except Exception as error:
        # Libraries say in the texts of different exceptions that something has run out.
        if problem := _exhausted(error):
            return _fail(problem, 1)
        raise
    except KeyboardInterrupt:
        return _fail("interrupted", 1)


def _exhausted(error: Exception) -> str:
    """Say what has run out, if an exception of a library is about that; otherwise an empty text."""
    text = str(error)
    # torch's error for a full GPU, compared by name because the command line does not import torch.
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory: lower --micro-batch-tokens, or the batch"
    if any(problem in text for problem in OUT_OF_MEMORY):
        return "out of memory, or of threads"
    if "Too many open files" in text:
        return "too many open files: raise the limit, for example with `ulimit -n 4096`"
    if text.startswith("DataLoader worker"):
        return "a process that loads data was killed, probably because memory ran out"
    return ""


def _check_processes(command: Any, arguments: Sequence[str]) -> None:
    """Refuse several processes for commands that do not share their work, because each process would write the same
    files, and refuse environment variables that torchrun would not set.

    Raises:
        ConfigError: names the command, or the variable.
    """
    asked, words = (command.command, 2) if isinstance(command, IndexGroup | EvaluateGroup) else (command, 1)
    if (count := world_size()) > 1 and not isinstance(asked, SHARED):
        name = " ".join(arguments[:words])
        raise ConfigError(f"{name}: works in one process; start it without torchrun (WORLD_SIZE is {count})")
    if count == 1:
        # Several processes check it when they create the process group.
        check_environment()


def _parse(arguments: list[str]) -> Any:
    file = _config_file(arguments)
    defaults = Train()
    if file is not None:
        defaults = Train(file=file, config=with_limits_of_flags(load_config(Path(file)), arguments))
    commands = (
        Annotated[Train, subcommand("train", default=defaults)]
        | Annotated[Encode, subcommand("encode")]
        | Annotated[IndexGroup, subcommand("index")]
        | Annotated[Search, subcommand("search")]
        | Annotated[Duplicates, subcommand("duplicates")]
        | Annotated[Serve, subcommand("serve")]
        | Annotated[Mine, subcommand("mine")]
        | Annotated[Score, subcommand("score")]
        | Annotated[Merge, subcommand("merge")]
        | Annotated[Study, subcommand("study")]
        | Annotated[Split, subcommand("split")]
        | Annotated[Push, subcommand("push")]
        | Annotated[Export, subcommand("export")]
        | Annotated[EvaluateGroup, subcommand("evaluate")]
    )
    box = io.StringIO()
    words = normalize_flags(arguments) if arguments[:1] == ["train"] else arguments
    if arguments[:1] == ["serve"]:
        words = [re.sub(r"^--pictures(?==|$)", "--images", word) for word in arguments]
    try:
        with contextlib.redirect_stderr(box), joined_lines():
            command: Any = tyro.cli(commands, prog="retriever", description=DESCRIPTION, args=words)
    except SystemExit as end:
        if end.code:
            raise ConfigError(_one_line(box.getvalue())) from None
        raise
    except ArgumentError:
        raise
    except ValueError as error:
        # A check of TrainConfig's own fields, which tyro lets through.
        raise ConfigError(str(error)) from None
    if isinstance(command, Train) and command.file != file:
        raise ConfigError(f"{command.file}: expected a configuration file, *.yaml, before any flag")
    return command


def _config_file(arguments: list[str]) -> str | None:
    """The configuration of `train`, needed before the flags are parsed, because it gives their defaults."""
    if arguments[:1] != ["train"]:
        return None
    names = (
        name
        for position, name in enumerate(arguments[1:])
        if not name.startswith("-") and (position == 0 or name.endswith((".yaml", ".yml")))
    )
    return next(names, None)


def _one_line(box: str) -> str:
    """The error in the box that tyro draws, and the nearest of tyro's proposals."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    # The first row is a title. Where the output is not UTF-8, rules are made of hyphens and there are no corners.
    rows = " ".join(row.strip("╭╮│╰╯ ") for row in text.splitlines()[1:])
    sections = [" ".join(section.split()) for section in re.split(r"[─-]{3,}", rows) if section.strip()]
    # The checks of our own dataclasses name the flag themselves.
    message = re.sub(r"^Error parsing (\S+: (?=--|\S+: expected))?(__tyro\S+: )?", "", sections[0])
    message = re.sub(r"invalid literal for int\(\) with base 10:", "expected a whole number, found", message)
    message = re.sub(
        r"no type matching \{None\}\|(\S+) could be instantiated from \[(.*?)\]\. .*",
        r"expected \1 or none, found \2",
        message,
    )
    message = re.sub(r"could not convert string to float:", "expected a number, found", message)
    proposal = sections[1]
    proposed, unknown = re.findall(r"--[\w.-]+", proposal), re.search(r"--[\w.-]+", message)
    if proposal.startswith("Perhaps you meant") and proposed:
        near = difflib.get_close_matches(unknown[0] if unknown else "", proposed, 1, cutoff=0.0)
        return f"{message}; did you mean {near[0]}?"
    return f"{message}; {proposal}" if proposal.startswith("Available") else message


def _flag(argument: str) -> str:
    return f"--{argument.replace('_', '-')}"


def _fail(error: object, code: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    # What was found may be a whole file.
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE - 200]} … {text[-200:]}"
    print(f"retriever: {escape_control(text)}", file=sys.stderr)
    return code
