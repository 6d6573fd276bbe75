"""The documentation builds without warnings, covers what is public, and its code runs."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from documentation import ROOT, Block, blocks_of, check, check_command, run_page
from forks import LoadedPython

import losses
import retriever
from retriever.cli.command_line import main

DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
RUN = [ROOT / "README.md", *TUTORIALS, *sorted((DOCS / "guides").glob("*.md"))]
CHECKED = sorted(set(DOCS.rglob("*.md")) - set(RUN))


@pytest.fixture(scope="session")
def small_model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder like all-MiniLM-L6-v2's, with a small encoder of random weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    tokenizer.save_pretrained(folder / "encoder")
    config = AutoConfig.for_model(**tiny.architecture, vocab_size=len(tokenizer), pad_token_id=0)
    AutoModel.from_config(config).save_pretrained(folder / "encoder")
    modules = [Transformer(str(folder / "encoder"), max_seq_length=64), Pooling(32), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "whole"), create_model_card=False)
    return folder / "whole"


@pytest.fixture
def reader(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the repository's scripts, pairs, and a model under the name that the pages use."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "sentence-transformers").mkdir()
    # A folder of this name comes before the model of this name on the Hub.
    (tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(small_model)
    pairs = [{"query": f"how tall is tower {n}", "positive": f"Tower {n} is {n} meters tall."} for n in range(300)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    write_run_of_the_first_tutorial(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run_of_the_first_tutorial(folder: Path) -> None:
    """Other pages refer to its configuration."""
    for block in blocks_of(DOCS / "tutorials" / "own_pairs.md"):
        if block.title == "run.yaml":
            (folder / block.title).write_text(block.code)


@pytest.mark.parametrize("page", RUN, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_the_code_of_a_page_runs(page: Path, reader: Path, python: LoadedPython) -> None:
    blocks = blocks_of(page)
    assert page not in TUTORIALS or any(not each.reason and each.language in ("bash", "python") for each in blocks)
    run_page(blocks, python)


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_the_commands_of_a_page_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run_of_the_first_tutorial(tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(page):
        check(block)


@pytest.mark.parametrize("package", ["losses", "index", "eval", "retriever"])
def test_the_files_that_a_package_lists_exist(package: str) -> None:
    table = (ROOT / package / "README.md").read_text(encoding="utf-8").partition("|---|---|\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE)
    names = re.findall(r"`([^`]+)`", " ".join(rows))
    assert names
    assert [name for name in names if not (ROOT / package / name).exists()] == []


def test_contributing_names_files_and_what_is_in_them() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("|---|---|\n")[2].partition("\n\n")[0]
    paths = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|setup\.cfg)`", table)
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
    named = re.findall(r"((?:`\w+`(?:, | and )?)+) in `([\w./-]+\.\w+)`", table)
    found = [(name, path) for names, path in named for name in re.findall(r"\w+", names.replace(" and ", " "))]
    assert ("order_ties", "index/ties.py") in found
    assert [(name, path) for name, path in found if name not in (ROOT / path).read_text(encoding="utf-8")] == []


def test_an_unknown_flag_or_script_is_found() -> None:
    with pytest.raises(retriever.ConfigError, match="--shards"):
        check_command(["torchrun", "-m", "retriever", "encode", "--model=m", "--data=d", "--out=o", "--shards=2"])
    with pytest.raises(retriever.ConfigError, match="--batchsize"):
        check_command(["GPUS=4", "scripts/launch/one_node.sh", "--batchsize", "8"])
    with pytest.raises(AssertionError, match="no such file"):
        check_command(["python", "scripts/missing.py"])


def test_a_failing_block_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: LoadedPython) -> None:
    monkeypatch.chdir(tmp_path)
    for language, code in (("bash", "retriever encode --model x --data y --out z\n"), ("python", "1 / 0\n")):
        with pytest.raises((AssertionError, ZeroDivisionError)) as failure:
            run_page([Block("page.md:7", language, "", code, "")], python)
        assert "page.md:7" in failure.value.__notes__[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "api" / "index.html").read_text(encoding="utf-8")
    for name in {*retriever.__all__, *losses.__all__} - {"__version__"}:
        assert f'id="retriever.{name}"' in page or f'id="losses.{name}"' in page, name


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link)[^>]*(?:src|href)="(https?://[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert not loaded, f"{page}: {loaded}"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The module that makes the reference."""
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module("reference_pages")
    finally:
        sys.path.remove(str(DOCS))


def test_the_reference_has_every_field_and_its_default(reference: ModuleType) -> None:
    page = reference.configuration_page()
    assert re.search(r"^`optim.lr`, number, default `2e-05`\n:   \w+", page, re.MULTILINE)
    assert "`model.image.lock`, `none` or `image` or `text`, default `none`" in page
    assert "## data.sources: entries" in page and "`path`, text, required" in page
    fields = re.findall(r"^`([\w.]+)`, ", page, re.MULTILINE)
    assert len(fields) == page.count("\n:   ") > 70


def test_the_reference_has_every_command(reference: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    listed = {name.split()[0] for name in reference.COMMANDS}
    groups = {name.split()[0] for name in reference.COMMANDS if " " in name}
    assert listed == set(subcommands([], capsys))
    for group in groups:
        expected = {name.split()[1] for name in reference.COMMANDS if name.startswith(f"{group} ")}
        assert expected == set(subcommands([group], capsys))
    assert "`--target-recall`, number or none, default none" in reference.command_page()


def subcommands(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The subcommands that `--help` lists."""
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    usage = re.search(r"\{([\w,\s-]+)\}", capsys.readouterr().out)
    assert usage is not None
    return [name.strip() for name in usage[1].split(",")]
