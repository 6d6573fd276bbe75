"""What the project shows is what its files say: README tables come from the results, recipes load."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from retriever.config.yaml_file import load_config

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))


@pytest.fixture
def readme_tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("readme_tables")


def test_readme_tables_are_those_of_the_committed_results(readme_tables: Any) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = readme_tables.tables()
    assert "| nDCG@10 | recall@100 |" in readme
    assert readme_tables.filled(readme, tables) == readme
    damaged = readme.replace("| nDCG@10 | recall@100 |", "| nDCG@5 | recall@50 |").replace("| acc5 |", "| acc6 |")
    assert readme_tables.filled(damaged, tables) == readme


@pytest.mark.parametrize(("folder", "made"), [("retriever", "throughput"), ("retriever/data/images", "pictures")])
def test_other_tables_are_those_of_the_committed_results(readme_tables: Any, folder: str, made: str) -> None:
    readme = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    tables = getattr(readme_tables, made)()
    assert tables
    assert all(f"<!-- {name} -->\n{table}<!-- /{name} -->" in readme for name, table in tables.items())


def test_tables_of_several_hardwares_compare_within_each(readme_tables: Any) -> None:
    from throughput_tables import train_table

    def row(hardware: str, method: str, rate: float, peak: str = "0", planned: str = "") -> dict[str, str]:
        rates = {"pairs_per_second": str(rate), "tokens_per_second": str(80 * rate), "flop_utilisation": "0.361"}
        memory = {"peak_mib": peak, "planned_mib": planned}
        return {"method": method, "batch": "16384", "hardware": hardware, "torch": "2.11", "commit": "abc"} | (
            rates | memory
        )

    table = train_table(
        [
            row("a GPU", "ours", 7000, "12000", "13000"),
            row("a GPU", "sentence-transformers, 16384 tokens", 1000),
            row("a GPU", "sentence-transformers, 65536 tokens", 1400),
            row("a CPU", "ours", 3.5),
        ]
    )
    assert "| 16,384 | ours | 7,000 | 560,000 | 5.00 | 36.1% | 12,000 (13,000) |" in table
    assert "| 16,384 | ours | 3.5 | 280 | – | 36.1% | – |" in table
    assert table.index("a GPU, torch 2.11, commit abc.") < table.index("| 3.5 |") < table.index("a CPU, torch 2.11")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_configurations(recipe: Path) -> None:
    data = load_config(recipe).data
    assert data.sources or data.images
