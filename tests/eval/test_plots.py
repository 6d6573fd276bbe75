"""Plots show the given values, in colors that the page can change."""

from __future__ import annotations

import itertools
import re

import pytest
from report_helpers import large_set, rows, whole_report

from eval.metrics import Metrics, Qrels, evaluate_run
from eval.ranking import RankedRun
from eval.reports import plots
from eval.reports.sizes import size_plot
from eval.sizes import BITS, SizeResult


def test_scores_are_split_by_relevance_over_judged_queries() -> None:
    qrels: Qrels = {"q1": {"a": 2, "b": 0, "lost": 1}, "q2": {"b": 1}}
    run = RankedRun.of({"q1": {"a": 5.0, "b": 4.0, "c": float("-inf")}, "q2": {"a": 3.0, "b": 2.0}, "q9": {"a": 9.0}})
    relevant, others = plots.split_scores(run, qrels)
    assert (sorted(relevant.tolist()), sorted(others.tolist())) == ([2.0, 5.0], [3.0, 4.0])


def test_a_run_without_scores_has_no_distribution() -> None:
    with plots.style():
        assert plots.score_distributions("empty", RankedRun.of({"q": {}}), {"q": {"a": 1}}) is None
        constant = RankedRun.of({"q": {"a": 1.0, "b": 1.0}})
        assert plots.score_distributions("constant", constant, {"q": {"a": 1}}) is not None


def test_bars_show_values_and_names() -> None:
    with plots.style():
        svg = plots.to_svg(plots.bars({"one": rows(), "two": rows()}, ["ndcg@10"]), "bars")
        single = plots.to_svg(plots.bars({"one": rows()}, ["ndcg@10", "recall@100"]), "bars")
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert texts.count("0.544") == 2 and texts.count("1.000") == 2
    assert {"one", "two", "before", "after", "nDCG@10"} <= set(texts)
    assert {"before", "after", "nDCG@10", "recall@100", "0.667"} <= set(re.findall(r">([^<>]+)</text>", single))


def test_all_points_of_the_plot_by_size_are_inside_and_labels_do_not_overlap() -> None:
    metrics = rows()["before"]
    sizes = [SizeResult(dim, kind, {"set": metrics}) for dim in (48, 96, 192, 384) for kind in BITS]
    for results in (sizes, sizes[-1:], [size for size in sizes if size.precision == "float32"]):
        with plots.style():
            figure = size_plot(results, "ndcg@10")
            figure.canvas.draw()
        (axes,) = figure.axes
        # A marker has some 6 of the 180 points of the height.
        assert axes.get_ylim()[1] > 1.05 * metrics.mean["ndcg@10"]
        boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        assert boxes and all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))


def test_recall_curves_end_at_the_depth_of_the_run() -> None:
    qrels: Qrels = {"q1": {"d3": 1, "d7": 1}, "q2": {"d0": 1}}
    run = {"q1": {f"d{n}": -float(n) for n in range(6)}, "q2": {f"d{n}": -float(n) for n in range(4)}}
    cuts = (1, 3, 5, 10, 100)
    metrics = evaluate_run(qrels, run, cuts)
    assert metrics.depth == 6
    assert plots.recall_points(metrics) == [(1, 0.5), (3, 0.5), (5, 0.75), (6, 0.75)]
    # A cut-off at the depth itself is drawn once.
    assert plots.recall_points(evaluate_run(qrels, run, (1, 6, 10))) == [(1, 0.5), (6, 0.75)]
    # Without a depth, and for a run that is deeper than every cut-off, all cut-offs are drawn.
    assert [k for k, _ in plots.recall_points(Metrics(metrics.mean, {}, []))] == list(cuts)
    assert [k for k, _ in plots.recall_points(evaluate_run(qrels, run, (1, 3)))] == [1, 3]
    assert plots.recall_points(evaluate_run(qrels, {}, cuts)) == []
    with plots.style():
        axes = plots.recall_curves({"shallow": metrics}).axes[0]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[1, 3, 5, 6]]


def test_depth_does_not_count_passages_that_are_left_out() -> None:
    qrels: Qrels = {"d1": {"d2": 1}, "q2": {"d1": 1}}
    run = {"d1": {"d1": 3.0, "d2": 2.0, "d3": 1.0}, "q2": {"d1": 1.0}}
    assert evaluate_run(qrels, run).depth == 2
    assert evaluate_run(qrels, run, drop_identical=False).depth == 3


def test_scatter_counts_wins_and_losses() -> None:
    found = large_set(60)
    pair = found.pairs[0]
    with plots.style():
        svg = plots.to_svg(plots.scatter(pair, found.systems[pair.a], found.systems[pair.b]), "scatter")
    assert f"▲ {pair.test.wins} better" in svg and f"▼ {pair.test.losses} worse" in svg


def test_svg_takes_its_colors_and_fonts_from_the_page_and_has_unique_ids() -> None:
    one = whole_report().sets[0]
    with plots.style():
        svgs = [
            plots.to_svg(plots.recall_curves(one.systems), 'a "label" <&>'),
            plots.to_svg(plots.bars({"x": one.systems}, ["ndcg@10"]), "bars"),
        ]
    for svg in svgs:
        assert "var(--s0)" in svg and "var(--ink)" in svg and "DejaVu" not in svg
        left = set(re.findall("#[0-9a-f]{6}", svg)) - {"#000000", "#ffffff"}
        assert not left, left
        assert "<metadata" not in svg and not re.findall(r'<g id="', svg)
    assert 'aria-label="a &quot;label&quot; &lt;&amp;&gt;"' in svgs[0]


@pytest.mark.parametrize("name", ["$x_1$", "a_very_long_name_that_goes_on_and_on_and_on", "日本語"])
def test_names_are_shown_unchanged_or_truncated(name: str) -> None:
    with plots.style():
        svg = plots.to_svg(plots.recall_curves({name: rows()["before"], "other": rows()["after"]}), "x")
    assert (name if len(name) <= 30 else name[:29] + "…") in svg
