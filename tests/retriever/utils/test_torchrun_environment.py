"""Commands under torchrun, and with environment variables that torchrun does not set."""

from __future__ import annotations

import os
import re
import typing
from pathlib import Path

import pytest
from cli_helpers import command

from retriever.cli import command_line as cli
from retriever.cli.commands.duplicates import Duplicates
from retriever.cli.commands.encode import Encode
from retriever.cli.commands.evaluation.evaluate import EvaluateBeir
from retriever.cli.commands.index import IndexBuild
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
from retriever.errors import ConfigError
from retriever.utils.torchrun import world_size

EMBED = ("--model", "m", "--data", "d", "--out", "o")
# Arguments of each command -> whether it supports several processes.
COMMANDS: dict[tuple[str, ...], bool] = {
    ("train",): True,
    ("encode", *EMBED): True,
    ("evaluate", "beir", *EMBED): True,
    ("index", "build", "--embeddings", "e", "--out", "o"): True,
    ("index", "tune", "i", "--embeddings", "e"): False,
    ("index", "merge", "i", "j", "--out", "o"): False,
    ("index", "add", "i", "--embeddings", "e"): False,
    ("index", "delete", "i", "--ids", "a"): False,
    ("index", "verify", "i"): False,
    ("search", "--model", "m", "--index", "i", "q"): False,
    ("duplicates", "--embeddings", "e", "--out", "o.jsonl"): False,
    ("serve", "--model", "m", "--index", "i"): False,
    ("mine", "--model", "m", "--data", "d", "--out", "o.jsonl"): True,
    ("score", "--model", "m", "--kind", "cross-encoder", "--data", "d", "--out", "o.jsonl"): True,
    ("merge", "--models", "a", "b", "--out", "o"): False,
    ("study", "s.yaml", "--out", "o"): False,
    ("push", "--model", "m", "--repo", "user/name"): False,
    ("export", "--model", "m", "--out", "o"): False,
    ("index", "export", "e", "--to", "parquet", "--where", "o"): False,
    ("split", "--data", "d", "--out", "o"): False,
    ("evaluate", "zero-shot", *EMBED): False,
    ("evaluate", "probe", *EMBED): False,
    ("evaluate", "run", "r", "--data", "d", "--out", "o"): False,
    ("evaluate", "compare", "r", "s", "--data", "d", "--out", "o"): False,
}
GROUPS = ("index", "evaluate")
TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def named(words: tuple[str, ...]) -> str:
    return " ".join(words[: 2 if words[0] in GROUPS else 1])


@pytest.fixture(autouse=True)
def without_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*TORCHRUN, "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_every_command_is_listed() -> None:
    in_groups = [kind for group in (cli.IndexCommand, cli.EvaluateCommand) for kind in typing.get_args(group)]
    alone = {Train, Encode, Search, Duplicates, Serve, Mine, Score, Merge, Study, Split, Push, Export}
    known = {typing.get_args(kind)[0] for kind in in_groups} | alone
    assert len(COMMANDS) == len(known)
    shared = {named(words) for words, shared_work in COMMANDS.items() if shared_work}
    assert shared == {"train", "encode", "evaluate beir", "index build", "mine", "score"}
    assert set(cli.SHARED) == {Train, Encode, EvaluateBeir, IndexBuild, Mine, Score}


@pytest.mark.parametrize("words", [words for words, shared_work in COMMANDS.items() if not shared_work], ids=named)
@pytest.mark.parametrize("rank", [0, 1])
def test_commands_of_one_process_refuse_torchrun(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], rank: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    done = command(*words)
    line = f"retriever: {named(words)}: works in one process; start it without torchrun (WORLD_SIZE is 2)\n"
    assert (done.code, done.out, done.err) == (2, "", line)
    assert not os.listdir()


@pytest.mark.parametrize("words", COMMANDS, ids=named)
@pytest.mark.parametrize("found", ["abc", "", "-1"])
def test_every_command_refuses_a_malformed_world_size(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], found: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", found)
    done = command(*words)
    line = f"retriever: WORLD_SIZE: expected a number of processes, as torchrun sets it, found {found!r}"
    assert (done.code, done.out, " ".join(done.err.split())) == (2, "", " ".join(line.split()))


@pytest.mark.parametrize("found", ["0", " 2", "+2", "2.0", "1_0", "²", "٢", "9" * 30])
def test_world_size_accepts_only_positive_decimal_numbers(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", found)
    with pytest.raises(ConfigError, match="WORLD_SIZE: expected a number of processes"):
        world_size()


RENDEZVOUS = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("words", [words for words, shared_work in COMMANDS.items() if shared_work], ids=named)
@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("RANK", None, "variable RANK expected, but not set"),
        ("RANK", "two", "RANK: expected a number from 0 to 1, found 'two'"),
        ("RANK", "", "RANK: expected a number from 0 to 1, found ''"),
        ("RANK", "2", "RANK: expected a number from 0 to 1, found '2'"),
        ("RANK", "-1", "RANK: expected a number from 0 to 1, found '-1'"),
        ("MASTER_ADDR", None, "variable MASTER_ADDR expected, but not set"),
        ("MASTER_PORT", None, "variable MASTER_PORT expected, but not set"),
        ("MASTER_PORT", "port", "MASTER_PORT: expected a number from 0 to 65535, found 'port'"),
        ("LOCAL_RANK", "x", "LOCAL_RANK: expected a number from 0 on, found 'x'"),
        ("LOCAL_WORLD_SIZE", "0", "LOCAL_WORLD_SIZE: expected a number from 1 on, found '0'"),
        ("TORCHELASTIC_RESTART_COUNT", "once", "TORCHELASTIC_RESTART_COUNT: expected a number from 0 on, found 'once'"),
    ],
)
def test_incomplete_torchrun_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], name: str, found: str | None, message: str
) -> None:
    for variable, value in ({**RENDEZVOUS, name: found}).items():
        if value is not None:
            monkeypatch.setenv(variable, value)
    done = command(*words)
    line = f"retriever: WORLD_SIZE is set, as under torchrun, but: {message}\n"
    assert (done.code, done.out, done.err) == (2, "", line)


@pytest.mark.parametrize("words", COMMANDS, ids=named)
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1"}, r"RANK is set \('1'\), but WORLD_SIZE is not: torchrun sets both"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: expected a number from 0 on, found 'x'"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK: expected a number from 0 to 1, found '2'"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, ".*RANK: expected a number from 0 to 0, found '1'"),
    ],
)
def test_every_command_refuses_inconsistent_variables(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = command(*words)
    assert (done.code, done.out) == (2, "") and re.fullmatch(f"retriever: {message}\n", done.err), done.err


def test_only_rank_0_answers_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**RENDEZVOUS, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    done = command("train", "--dry-run")
    assert (done.code, done.out, done.err) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    # Only rank 0 reports the missing model.
    assert "model.name" in command("train", "--dry-run").err


@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({}, 4, "cuda"),
        ({"LOCAL_RANK": "2"}, 4, "cuda:2"),
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "3"}, 4, "cuda:3"),
        # Each process sees only one GPU.
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "3"}, 1, "cuda:0"),
        ({"WORLD_SIZE": "8"}, 1, "cuda"),
        ({"WORLD_SIZE": "8"}, 4, None),
    ],
)
def test_each_process_uses_the_gpu_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], gpus: int, expected: str | None
) -> None:
    import torch

    from retriever.distributed.context import rank_device

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(ConfigError, match="variable LOCAL_RANK expected, but not set"):
            rank_device(torch.device("cuda"))
    else:
        assert rank_device(torch.device("cuda")) == torch.device(expected)
    assert rank_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert rank_device(torch.device("cpu")) == torch.device("cpu")
