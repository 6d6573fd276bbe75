"""What the project shows is what its files say: README tables come from the results, recipes load."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from retriever.config import load_config

HOUSE = Path(__file__).resolve().parent.parent.parent
RECIPES = sorted((HOUSE / "scripts" / "recipes").glob("*.yaml"))


def test_readme_tables_are_those_of_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("readme_tables", HOUSE / "scripts" / "readme_tables.py")
    assert spec is not None and spec.loader is not None
    readme_tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme_tables)
    readme = (HOUSE / "README.md").read_text(encoding="utf-8")
    assert "| nDCG@10 | recall@100 |" in readme
    assert readme_tables.filled(readme) == readme
    damaged = readme.replace("| nDCG@10 | recall@100 |", "| nDCG@5 | recall@50 |").replace("| acc5 |", "| acc6 |")
    assert readme_tables.filled(damaged) == readme


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_configurations(recipe: Path) -> None:
    data = load_config(recipe).data
    assert data.sources or data.images
