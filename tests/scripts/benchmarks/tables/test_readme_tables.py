"""Tables in the README and the documentation equal those generated from the CSV files in scripts/results."""

from __future__ import annotations

import pytest

from scripts import RESULTS, ROOT
from scripts.benchmarks.tables.markers import fill_tables
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
    common = {"hardware": "a GPU", "batch": "1024", "torch": "2.11", "commit": "abc"}
    scores = {("no option", "0"): "0.30", ("no option", "1"): "0.32", ("loss.guide", "0"): "0.35"}
    rows = [
        {"switch": name, "seed": seed, "ndcg@10": score, "recall@100": "0.5", "pairs_per_second": "9000", **common}
        for (name, seed), score in scores.items()
    ]
    table = switch_table(rows)
    assert "| no option | 0.3100 | 0.3000 – 0.3200 | 0.5000 | 9,000 |" in table
    assert "| loss.guide | 0.3500 |" in table and "batches of 1,024, 2 seeds, on a GPU" in table
