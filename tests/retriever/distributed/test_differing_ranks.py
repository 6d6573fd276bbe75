"""Processes with different settings or inputs end at once, each with one line that names the difference."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import write_beir
from forks import LoadedPython
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parents[1]
# Case -> exit code, standard output and standard error of each process.
Outcomes = dict[str, list[tuple[int, str, str]]]

TWO = r"{} differs between ranks: {} on rank 0, {} on rank 1"
SUM = r"\(?sha256 [0-9a-f]{12}…\)?"
PLACED = rf"\S+ {SUM}"
# Case -> pattern of the message.
DIFFERING = {
    "seed": TWO.format("seed", 0, 1),
    "seed of the third": "seed differs between ranks: 0 on ranks 0-1, 1 on rank 2",
    "batch size": TWO.format("batch_size", 16, 12),
    "learning rate": TWO.format(r"optim\.lr", "0.001", "3e-05"),
    "dev.every": TWO.format(r"dev\.every", 500, 2),
    "checkpoint_every": TWO.format("checkpoint_every", 500, 2),
    "several fields": TWO.format("seed", 0, 1) + r" \(so do log_every, checkpoint_every\)",
    "out": TWO.format("out", r"\S+/out", r"\S+/other"),
    "data copy": TWO.format(r"data\.sources\[0\]", PLACED, PLACED),
    "model copy": TWO.format("model", PLACED, PLACED),
    "dev corpus copy": TWO.format(r"dev\.path", PLACED, PLACED),
    "dev qrels copy": TWO.format(r"dev\.path", PLACED, PLACED),
    "no dev set": TWO.format(r"dev\.path", PLACED, "none") + r" \(so do dev\.paths\)",
    "newest checkpoint": TWO.format("checkpoint", rf"\S+step-00000004 {SUM}", rf"\S+step-00000002 {SUM}")
    + r" \(so do step.*\)",
    "copy of the run": TWO.format("out", r"\S+/kept", r"\S+/copies/kept"),
    "begun and resumed": TWO.format("--resume", "false", "true") + r" \(so do .*\)",
    "encode: model copy": TWO.format("model", SUM, SUM),
    "encode: corpus copy": TWO.format("corpus", PLACED, PLACED),
    "encode: dtype": TWO.format("--dtype", "float32", "float16"),
    "encode: out": TWO.format("out", r"\S+", r"\S+"),
    "evaluate: model copy": TWO.format("model", SUM, SUM),
    "evaluate: corpus copy": TWO.format("words: corpus", PLACED, PLACED),
    "evaluate: qrels copy": TWO.format("words: qrels", PLACED, PLACED),
    "evaluate: queries copy": TWO.format("words: queries", PLACED, PLACED),
    "evaluate: k": TWO.format("--k", 1000, 10),
    "evaluate: prompts": TWO.format(r"--settings\.default\.query[-_]prompt", "tell:", "ask:"),
    "evaluate: out": TWO.format("out", r"\S+", r"\S+"),
    "index: embeddings copy": TWO.format("embeddings", PLACED, PLACED),
    "index: factory": TWO.format("--factory", "Flat", "SQ8"),
    "index: out": TWO.format("out", r"\S+", r"\S+"),
    "commands": TWO.format("command", "encode", "evaluate beir") + r" \(so do .*\)",
}


def changed_model(model: Path, folder: Path) -> Path:
    """Copy a model and change one weight."""
    # Without its checksums, which would not match.
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("retriever.sha256"))
    file = folder / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def changed_set(folder: Path, name: str, old: str, new: str) -> Path:
    """Write the BEIR folder of the tests with one file changed."""
    made = write_beir(folder / "words")
    text = (made / name).read_text()
    assert old in text
    (made / name).write_text(text.replace(old, new, 1))
    return made


def write_cases(world: Any, folder: Path) -> dict[str, list[str]]:
    """Return the command lines of every case, one per process."""
    sets = {
        "corpus": changed_set(folder / "corpus", "corpus.jsonl", "purrs", "meows"),
        "qrels": changed_set(folder / "qrels", "qrels/test.tsv", "q1\td1\t2", "q1\td1\t1"),
        "dev": changed_set(folder / "dev", "qrels/dev.tsv", "q1\td1\t2", "q1\td1\t1"),
        "queries": changed_set(folder / "queries", "queries.jsonl", "what is a cat?", "what is a kitten?"),
    }
    model, same_model = changed_model(world.model, folder / "model"), folder / "again" / "model"
    shutil.copytree(world.model, same_model)
    pairs, same_pairs = folder / "pairs.jsonl", folder / "same.jsonl"
    pairs.write_text(world.pairs.read_text().replace("purrs", "meows", 1))
    shutil.copy(world.pairs, same_pairs)
    for name, text in (("asks", "query_prompt: 'ask: '"), ("tells", "query_prompt: 'tell: '")):
        (folder / f"{name}.yaml").write_text(f"default: {{{text}}}\n")
    (folder / "copies" / "kept").mkdir(parents=True)

    def config(name: str, data: Path, **changes: Any) -> Path:
        source = {"path": str(data), "query": "question", "positive": "answer", "negatives": "wrong"}
        tree = yaml.safe_load(world.config.read_text())
        tree |= {"model": {"name": str(world.model)}, "steps": 4, "device": "cpu", "dev": {"path": str(world.beir)}}
        tree |= {"data": {"sources": [source], "workers": 0, **changes}}
        (path := folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        return path

    def varied(command: str, *changes: str | tuple[object, object]) -> list[str]:
        """Return the command, and for each change the command with more words or with replaced text."""
        others = [f"{command} {c}" if isinstance(c, str) else command.replace(str(c[0]), str(c[1])) for c in changes]
        return [command, *others]

    run = config("run", world.pairs)
    elsewhere = config("elsewhere", same_pairs, cache=str(folder / "cache"))
    train = f"train {run} --out {folder}/out"
    kept = f"train {run} --checkpoint-every 2 --out {folder}/kept"
    resume = f"train --resume {folder}/kept"
    encode = f"encode --model {world.model} --data {world.beir} --device cpu --out {folder}/embeddings"
    evaluate = f"evaluate beir --model {world.model} --data {world.beir} --device cpu --out {folder}/report"
    index = f"index build --embeddings {world.embeddings} --factory Flat --out {folder}/index"
    other_embeddings = f"encode --model {world.model} --data {sets['corpus']} --out {folder}/other-embeddings"
    restarted = f"train {run} --steps 1 --out {folder}/restarted --environment TORCHELASTIC_RESTART_COUNT"
    return {
        "same contents elsewhere": [kept, f"{kept.replace(str(run), str(elsewhere))} --model.name {same_model}"],
        "resumed": [resume, resume],
        "restarted before it began": [f"{restarted}=1"],
        "restarted": [f"{restarted}=2"],
        "other embeddings": [other_embeddings],
        "preflight": [f"{evaluate} --preflight --json"] * 2,
        "one fails first": [train, train, f"{train} --device cuda:7"],
        "seed": varied(train, "--seed 1"),
        "seed of the third": varied(train, "", "--seed 1"),
        "batch size": varied(train, "--batch-size 12"),
        "learning rate": varied(train, "--optim.lr 3e-5"),
        "dev.every": varied(train, "--dev.every 2"),
        "checkpoint_every": varied(train, "--checkpoint-every 2"),
        "several fields": varied(train, "--seed 1 --checkpoint-every 2 --log-every 1"),
        "out": varied(train, ("/out", "/other")),
        "data copy": varied(train, (run, config("other-data", pairs))),
        "model copy": varied(train, f"--model.name {model}"),
        "dev corpus copy": varied(train, f"--dev.path {sets['corpus']}"),
        "dev qrels copy": varied(train, f"--dev.path {sets['dev']}"),
        "no dev set": varied(train, "--dev.path="),
        "newest checkpoint": varied(resume, "--environment WITHOUT_NEWEST=1"),
        "copy of the run": varied(resume, ("/kept", "/copies/kept")),
        "begun and resumed": [train, resume],
        "encode: model copy": varied(encode, (world.model, model)),
        "encode: corpus copy": varied(encode, (world.beir, sets["corpus"])),
        "encode: dtype": varied(encode, "--dtype float16"),
        "encode: out": varied(encode, ("/embeddings", "/other")),
        "evaluate: model copy": varied(evaluate, (world.model, model)),
        "evaluate: corpus copy": varied(evaluate, (world.beir, sets["corpus"])),
        "evaluate: qrels copy": varied(evaluate, (world.beir, sets["qrels"])),
        "evaluate: queries copy": varied(evaluate, (world.beir, sets["queries"])),
        "evaluate: k": varied(evaluate, "--k 10"),
        "evaluate: prompts": varied(f"{evaluate} --settings {folder}/tells.yaml", ("/tells", "/asks")),
        "evaluate: out": varied(evaluate, ("/report", "/other")),
        "index: embeddings copy": varied(index, (world.embeddings, f"{folder}/other-embeddings")),
        "index: factory": varied(index, ("Flat", "SQ8")),
        "index: out": varied(index, ("/index", "/other")),
        "commands": [encode, evaluate],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the cases read and write."""
    return tmp_path_factory.mktemp("differing")


@pytest.fixture(scope="module")
def outcomes(python: LoadedPython, world: Any, folder: Path) -> Outcomes:
    """Run all cases in forks of one process, because importing the libraries takes longer than the cases."""
    cases, found = folder / "cases.json", folder / "outcomes.json"
    cases.write_text(json.dumps(write_cases(world, folder)))
    done = python.run(HERE / "differing_ranks.py", cases, found, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads(found.read_text())


@pytest.mark.parametrize("case", DIFFERING)
def test_a_difference_ends_every_process_with_the_same_message(outcomes: Outcomes, case: str) -> None:
    found = outcomes[case]
    assert None not in found, "a process did not end"
    assert [code for code, _, _ in found] == [1] * len(found), found
    lines = [[line for line in err.splitlines() if line.startswith("retriever: ")] for _, _, err in found]
    assert lines == [lines[0]] * len(found) and len(lines[0]) == 1, found
    assert re.fullmatch(f"retriever: {DIFFERING[case]}", lines[0][0]), found
    assert not any(out for _, out, _ in found) and not any(err.splitlines()[1:] for _, _, err in found[1:]), found


def test_paths_and_workers_may_differ_if_contents_are_equal(outcomes: Outcomes) -> None:
    first, second = outcomes["same contents elsewhere"]
    assert first[0] == second[0] == 0, first[2]
    assert "step 4/4" in first[2] and second[1:] == ["", ""]


def test_only_rank_0_reports_the_resumed_checkpoint(outcomes: Outcomes) -> None:
    first, second = outcomes["resumed"]
    assert first[0] == second[0] == 0, first[2]
    assert re.search(r"^resuming from \S+/kept/checkpoints/step-00000004 \(step 4 of 4\)$", first[2], re.MULTILINE)
    assert second[1:] == ["", ""]


def test_a_restart_by_torchrun_is_reported(outcomes: Outcomes) -> None:
    for case, line in (
        ("restarted before it began", "restarted by torchrun (attempt 1): starting from the beginning"),
        ("restarted", "restarted by torchrun (attempt 2): resuming from "),
    ):
        ((code, _, err),) = outcomes[case]
        assert code == 0 and err.count(line) == err.count("restarted by torchrun") == 1, err


def test_only_rank_0_answers_a_preflight(outcomes: Outcomes) -> None:
    first, second = outcomes["preflight"]
    assert json.loads(first[1])["sets"]["words"]["passages"] == 20
    assert first[0] == 0 and second == [0, "", ""]


def test_an_early_failure_ends_all_processes(outcomes: Outcomes) -> None:
    found = outcomes["one fails first"]
    assert None not in found and [code for code, _, _ in found] == [1, 1, 1], found
    said = [line for _, _, err in found for line in err.splitlines() if line.startswith("retriever:")]
    assert len(said) == 1 and "'cuda:7' is not on this machine" in said[0], found


def test_refused_commands_leave_no_files(outcomes: Outcomes, folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert not names & {"out", "other", "report", "embeddings", "index"}, names
    assert not [path for path in folder.rglob(".*")]
