"""Tables in the README and the documentation equal those generated from the CSV files in scripts/results."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import RESULTS, ROOT
from scripts.benchmarks.result_rows import write_rows
from scripts.benchmarks.tables.markers import fill_tables
from scripts.benchmarks.tables.nested_tables import cross_step_table, distillation_tables, matryoshka_tables
from scripts.benchmarks.tables.readme_tables import PAGES
from scripts.benchmarks.tables.switch_tables import switch_table
from scripts.benchmarks.tables.throughput_tables import train_table


@pytest.mark.parametrize("page", PAGES)
def test_tables_equal_the_committed_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    tables = PAGES[page](RESULTS)
    if not tables:
        pytest.skip("its benchmark has not run yet")
    assert fill_tables(text, tables) == text
    damaged = text.replace(next(iter(tables.values())).splitlines()[0], "another line")
    assert damaged != text and fill_tables(damaged, tables) == text


def test_a_missing_marker_is_refused() -> None:
    with pytest.raises(ValueError, match="<!-- scale -->"):
        fill_tables("<!-- ring -->\n<!-- /ring -->", {"ring": "a\n", "scale": "b\n"})


def test_speed_up_is_relative_to_the_same_hardware() -> None:
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


def test_options_of_the_loss_are_averaged_over_seeds() -> None:
    common = {"hardware": "a GPU", "batch": "1024", "torch": "2.11", "commit": "abc", "recall@100": "0.5"}
    common |= {"jargon_ndcg@10": "0.6", "perlfaq_ndcg@10": "0.7"}
    scores = {("before training", "0"): "0.20", ("no option", "0"): "0.30", ("no option", "1"): "0.32"}
    rows = [
        {
            "switch": name,
            "seed": seed,
            "ndcg@10": score,
            "pairs_per_second": "" if name == "before training" else "9000",
            **common,
        }
        for (name, seed), score in scores.items()
    ]
    table = switch_table(rows)
    assert "| no option | 0.3100 | 0.3000 – 0.3200 | 0.5000 | 0.6000 | 0.7000 | 9,000 |" in table
    assert "| before training | 0.2000 | 0.2000 – 0.2000 | 0.5000 | 0.6000 | 0.7000 | – |" in table
    assert "batches of 1,024" in table and "2 seeds, on a GPU" in table


def test_runs_of_the_nested_benchmark_are_averaged_over_seeds(tmp_path: Path) -> None:
    common = {"hardware": "a GPU", "passages": 1000, "steps": 300, "batch": 1024, "lr": 1e-4, "torch": "2.11"}
    common |= {"commit": "abc", "recall@100": 0.5}
    scores = [
        ("matryoshka", "plain", 0, 96, 0.2),
        ("matryoshka", "plain", 0, 384, 0.3),
        ("matryoshka", "plain", 1, 384, 0.32),
        ("matryoshka", "matryoshka", 0, 96, 0.29),
        ("distillation", "student with teacher", 0, 384, 0.4),
        ("query tower", "query_only", 0, 384, 0.45),
    ]
    columns = ("comparison", "run", "seed", "dim", "ndcg@10")
    write_rows([dict(zip(columns, row, strict=True)) | common for row in scores], tmp_path / "nested_training.csv")
    by_dimension = matryoshka_tables(tmp_path)["matryoshka"]
    assert "| model | 96 | 384 |" in by_dimension and "| plain | 0.2000 | 0.3100 |" in by_dimension
    assert "| matryoshka | 0.2900 | – |" in by_dimension
    tables = distillation_tables(tmp_path)
    assert "| student without | 0.3100 | 0.3000 – 0.3200 | 0.5000 |" in tables["distillation"]
    assert "| student with teacher | 0.4000 |" in tables["distillation"]
    assert "| query_only | 0.4500 |" in tables["query_tower"]


def test_runs_with_older_passages_are_averaged_over_seeds() -> None:
    common = {"hardware": "a GPU", "passages": "0", "steps": "200", "batch": "1024", "lr": "0.0001", "torch": "2.11"}
    common |= {"commit": "abc", "loss": "1.5", "oldest_cosine": "0.9", "seconds": "4"}
    rows = [
        {"run": "none", "seed": seed, "dev_ndcg@10": score, **common} for seed, score in (("0", "0.3"), ("1", "0.4"))
    ]
    other = {"run": "last 4 steps", "seed": "0", "dev_ndcg@10": "0.1", **common, "steps": "9"}
    table = cross_step_table([other, *rows])
    assert "| none | 0.3500 | 1.500 | 0.900 | 4.0 |" in table and "last 4 steps" not in table
    assert "MiniLM on all passages of WordNet, 200 steps of 1,024 pairs, 2 seeds, on a GPU" in table
