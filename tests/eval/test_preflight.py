"""Errors and warnings of a BEIR folder are found, counted, and reported with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.evaluate import evaluate_beir
from eval.sets import preflight as checking
from eval.sets.digests import SAMPLE
from eval.sets.estimate import Estimate, Lengths, estimate, warn_of_lengths
from eval.sets.preflight import Preflight, preflight
from index.beir import BeirDataset
from index.files import InputError
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter

HEADER = "query-id\tcorpus-id\tscore\n"


def write(folder: Path, corpus: list[object], queries: list[object], **qrels: str) -> Path:
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for split, text in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text(text)
    return folder


def passages(count: int) -> list[object]:
    return [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(count)]


def questions(count: int) -> list[object]:
    return [{"_id": f"q{i}", "text": f"ask {i}"} for i in range(count)]


def kinds(found: Preflight) -> dict[str, int]:
    return {finding.what: finding.count for finding in found.findings.values()}


def test_a_valid_folder_has_no_findings(tmp_path: Path) -> None:
    found = preflight(write(tmp_path / "s", passages(5), questions(3), test=HEADER + "q0\td1\t1\nq2\td4\t2\n"))
    assert not found.findings and (found.passages, found.queries, found.judgements) == (5, 2, 2)
    assert sorted(found.query_sample) == ["ask 0", "ask 2"] and len(found.passage_sample) == 5
    found.refuse()


def test_duplicates_and_repeated_texts_are_named_with_both_lines(tmp_path: Path) -> None:
    corpus = [*passages(4), {"_id": "d1", "text": "new"}, {"_id": "d9", "text": "text 2"}, {"_id": "e", "text": " "}]
    folder = write(
        tmp_path / "s", ["", *corpus], [*questions(1), {"_id": "q0", "text": "x"}], test=HEADER + "q0\td1\t1\n"
    )
    found = preflight(folder)
    assert kinds(found) == {
        "duplicate query ids": 1,
        "passages without any text": 1,
        "duplicate passage ids": 1,
        "passages with the text of an earlier one": 1,
    }
    first = f"{folder}/corpus.jsonl:6: expected each passage id once, found d1 again, first in {folder}/corpus.jsonl:3"
    assert found.findings["duplicate passage ids"].locations == [first]
    twice = found.findings["passages with the text of an earlier one"]
    assert twice.locations == [f"{folder}/corpus.jsonl:7: as {folder}/corpus.jsonl:4"] and not twice.error
    with pytest.raises(InputError, match=r"queries\.jsonl:2: expected each query id once.* \(and 1 more errors in s\)"):
        found.refuse()


def test_many_duplicates_are_counted_and_three_located(tmp_path: Path) -> None:
    corpus = [*passages(40), *passages(40), *passages(7)]
    found = preflight(write(tmp_path / "s", corpus, questions(1), test="q0\td1\t1\n"))
    finding = found.findings["duplicate passage ids"]
    assert finding.count == 47 and len(finding.locations) == 3 and "corpus.jsonl:41:" in finding.locations[0]
    assert str(finding).startswith("duplicate passage ids: 47; first ")


def test_dangling_ids_are_errors_unless_allowed(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", passages(2), questions(1), test=HEADER + "q0\td1\t1\nq0\tgone\t1\nq7\td0\t1\n")
    found = preflight(folder)
    assert kinds(found) == {"judged queries that are not there": 1, "judged passages that are not there": 1}
    assert len(found.errors) == 2
    lost = [found.findings[f"judged {what} that are not there"].locations for what in ("queries", "passages")]
    assert [len(places) for places in lost] == [1, 1]
    assert lost[0][0].endswith("qrels/test.tsv:4: expected ids of queries.jsonl, found q7, which is not there")
    assert lost[1][0].endswith("qrels/test.tsv:3: expected passage ids of the corpus, found gone, which is not there")
    assert not preflight(folder, dangling=True).errors
    with EmbeddingWriter(tmp_path / "e", dim=2, model={"name": "m"}, source={}) as writer:
        writer.append(list(BeirDataset.open(folder, dangling=True).passages()), np.eye(2, dtype=np.float32))
    dataset = BeirDataset.open(folder, dangling=True)
    store = EmbeddingStore.open(tmp_path / "e")
    _, metrics = evaluate_beir(dataset, store=store, embed_queries=lambda texts: np.eye(2, dtype=np.float32)[1:])
    assert metrics.missing == ["q7"] and metrics.mean["recall@100"] == 0.25


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("corpus-id\tquery-id\tscore\nq0\td1\t1\n", "header mistakes", ":1: expected the query's id in the first"),
        ("frage\tdokument\tnote\nq0\td1\t1\n", "header mistakes", ":1: expected a header"),
        (HEADER + "q0\td1\t1\n" + HEADER, "headers within the file", ":3: expected a judgement"),
        (HEADER + "q0\td1\t1\nq0\td0\tyes\n", "broken judgements", ":3: expected a whole number"),
        (HEADER + "q0\td1\t1\nq0\td0\n", "broken judgements", ":3: expected 3 "),
        (HEADER + "q0\td1\t1\nq0\td1\t2\n", "broken judgements", ":3: expected one grade"),
        (HEADER, "no judgements", "test.tsv: expected judgements"),
    ],
)
def test_mistakes_in_qrels_are_errors_with_their_line(tmp_path: Path, text: str, what: str, line: str) -> None:
    found = preflight(write(tmp_path / "s", passages(2), questions(1), test=text))
    assert line in found.findings[what].locations[0] and found.findings[what].error


def test_the_first_three_of_many_dangling_ids_are_located(tmp_path: Path) -> None:
    judged = "".join(f"q0\tgone{i % 5}\t1\n" for i in range(10))
    found = preflight(write(tmp_path / "s", passages(2), questions(1), test=f"{HEADER}one\n{judged}q0\td0\t1\n"))
    finding = found.findings["judged passages that are not there"]
    assert finding.count == 5 and [place.split(":")[1] for place in finding.locations] == ["3", "4", "5"]


def test_swapped_columns_are_recognized(tmp_path: Path) -> None:
    found = preflight(write(tmp_path / "s", passages(2), questions(2), test=HEADER + "d0\tq0\t1\nd1\tq1\t1\n"))
    assert "columns in the wrong order" in kinds(found)


def test_a_missing_header_is_a_warning_because_beir_drops_the_line(tmp_path: Path) -> None:
    found = preflight(write(tmp_path / "s", passages(2), questions(1), test="q0\td1\t1\n"))
    assert not found.errors and "no header: the beir package would drop the first judgement" in kinds(found)


def test_queries_of_the_training_split_are_counted_by_id_and_by_text(tmp_path: Path) -> None:
    queries = [*questions(3), {"_id": "t1", "text": "ASK  0"}, {"_id": "t2", "text": "other"}]
    folder = write(
        tmp_path / "s",
        passages(2),
        queries,
        test=HEADER + "q0\td1\t1\nq1\td0\t1\n",
        train=HEADER + "t1\td1\t1\nt2\td1\t1\nq1\td1\t1\n",
    )
    found = preflight(folder)
    assert kinds(found) == {"queries with the text of one in train": 1, "queries judged in train too": 1}
    train = f"{folder}/qrels/train.tsv"
    assert found.findings["queries judged in train too"].locations == [f"{train}:4: q1"]
    assert found.findings["queries with the text of one in train"].locations == [f"{train}:2: t1"]
    assert not found.errors


def test_queries_without_relevant_passages_or_with_passage_ids_give_warnings(tmp_path: Path) -> None:
    corpus = [*passages(2), {"_id": "q1", "text": "ask 1"}]
    folder = write(tmp_path / "s", corpus, questions(2), test=HEADER + "q0\td1\t0\nq1\td0\t1\n")
    found = preflight(folder)
    assert len(found.warnings) == 2 and not found.errors
    assert found.findings["queries without a relevant passage, which count as 0"].locations == [
        f"{folder}/qrels/test.tsv:2: q0"
    ]


def test_counts_that_differ_from_the_published_ones_give_a_warning(tmp_path: Path) -> None:
    folder = write(tmp_path / "scifact", passages(2), questions(1), test=HEADER + "q0\td1\t1\n")
    found = preflight(folder)
    assert found.findings["other number of passages than published"].locations[0].endswith("expected 5,183, found 2")


def test_broken_and_missing_files_are_errors(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", [*passages(2), "{", {"_id": "d3", "text": "x"}], questions(1), test="q0\td1\t1\n")
    assert "corpus.jsonl:3: expected JSON" in preflight(folder).errors[0].locations[0]
    (folder / "queries.jsonl").unlink()
    assert "expected queries.jsonl or queries.jsonl.gz" in preflight(folder).errors[0].locations[0]
    folder = write(tmp_path / "t", [{"_id": "d 1", "text": "x"}, {"text": "x"}], questions(1), test="q0\td1\t1\n")
    assert preflight(folder).findings["broken passages"].count == 2


def test_the_sample_is_bounded_and_the_same_on_every_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "s", passages(3 * SAMPLE), questions(1), test=HEADER + "q0\td1\t1\n")
    sample = preflight(folder).passage_sample
    assert SAMPLE // 4 < len(sample) <= SAMPLE and sample == preflight(folder).passage_sample


def test_progress_counts_the_passages_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "PROGRESS_STEP", 4)
    told: list[int] = []
    preflight(write(tmp_path / "s", passages(11), questions(1), test=HEADER + "q0\td1\t1\n"), progress=told.append)
    assert told == [4, 4]


def test_lengths_are_counted_against_the_maximum() -> None:
    lengths = Lengths(np.array([3, 16, 17, 40, 300]), 64)
    assert lengths.histogram() == {"1-16": 2, "17-32": 1, "33-64": 1, "65-128": 0, "129-256": 0, "257-512": 1}
    assert (lengths.cut, lengths.mean_read) == (0.2, (3 + 16 + 17 + 40 + 64) / 5)
    assert "20.0% above the maximum of 64" in str(lengths) and Lengths(np.array([], int), 8).histogram() == {}
    found = Preflight("s", "test")
    warn_of_lengths(found, {"document": lengths, "query": Lengths(np.array([2]), 64)})
    assert len(found.warnings) == 1 and "20.0% of a sample of 5, longest 300 of 64" in str(found.warnings[0])


def test_the_estimate_grows_with_the_corpus_and_reports_free_disk_space(tmp_path: Path) -> None:
    lengths = {"query": Lengths(np.array([8]), 64), "document": Lengths(np.array([50, 150]), 100)}
    small, large = (
        estimate(
            Preflight("s", "test", passages=rows, queries=10, bytes=500 * rows),
            lengths,
            dim=4,
            k=10,
            out=tmp_path / "a" / "b",
            tokens_per_second=1000.0,
        )
        for rows in (1000, 100_000)
    )
    assert small.tokens == 1000 * 75 + 80 and small.seconds == pytest.approx(75.08)
    assert large.disk > 90 * small.disk and small.free > 0
    assert "75 s of encoding" in str(small)


def test_the_estimate_includes_an_index_that_is_searched_or_built(tmp_path: Path) -> None:
    lengths = {side: Lengths(np.array([8]), 64) for side in ("query", "document")}
    found = Preflight("s", "test", passages=1000, queries=10, bytes=500_000)

    def expected(**index: Any) -> Estimate:
        return estimate(found, lengths, dim=4, k=10, out=tmp_path, **index)

    none, given, built = expected(), expected(index=2**30), expected(index=2**30, build=True)
    assert none.memory < 2**28 < 2**30 < given.memory == built.memory < 1.01 * 2**30
    assert none.disk < given.disk < none.disk + 2**20 and built.disk > none.disk + 2**30 + 500_000


def test_qrels_with_shifted_columns_are_errors(tmp_path: Path) -> None:
    rows = "0\tq0\td1\t1\n1\tq1\td2\t1\n"
    for name, header, kind in (("one", HEADER, "broken judgements"), ("two", "", "files that cannot be read")):
        found = preflight(write(tmp_path / name, passages(3), questions(2), test=header + rows))
        assert kind in {finding.what for finding in found.errors}
        with pytest.raises(
            InputError, match=r"test\.tsv(:2: expected 3 columns, found 4|:1: expected query, 0, passage)"
        ):
            found.refuse()
    header = "query-id\tcorpus-id\tsplit\tscore\n"
    found = preflight(write(tmp_path / "three", passages(3), questions(2), test=header + "q0\td1\ttest\t1\n"))
    assert kinds(found)["header mistakes"] == 1


def test_integer_grades_written_as_floats_and_comments_are_valid(tmp_path: Path) -> None:
    text = "# judged by hand\n" + HEADER + "q0\td1\t1.0\n# the second query\nq1\td2\t2\n"
    assert not preflight(write(tmp_path / "s", passages(3), questions(2), test=text)).findings
    found = preflight(
        write(tmp_path / "t", passages(3), [*questions(1), {"_id": "#1", "text": "x"}], test=HEADER + "q0\td1\t1\n")
    )
    assert [finding.what for finding in found.errors] == ["broken queries"]


@pytest.mark.parametrize(("keep", "count"), [(False, 1), (True, None)])
def test_queries_with_the_id_of_an_unjudged_passage_are_counted(tmp_path: Path, keep: bool, count: int | None) -> None:
    """The pair (d0, d0) is judged, (d1, d1) is not."""
    asked: list[object] = [{"_id": f"d{i}", "text": f"ask {i}"} for i in range(2)]
    folder = write(tmp_path / "s", passages(3), asked, test=HEADER + "d0\td0\t1\nd1\td2\t1\n")
    found = preflight(folder, keep_identical_ids=keep)
    what = "queries with the id of a passage that is not judged for them, which is left out of their ranking"
    assert kinds(found).get(what) == count


def test_another_split_with_shifted_columns_is_not_compared(tmp_path: Path) -> None:
    """The row numbers of the other split equal query ids of this split."""
    asked: list[object] = [{"_id": str(i), "text": f"ask {i}"} for i in range(3)]
    train = HEADER + "0\t7\td1\t1\n1\t8\td2\t1\n"
    folder = write(tmp_path / "s", passages(3), asked, test=HEADER + "0\td1\t1\n1\td2\t1\n", train=train)
    found = preflight(folder)
    assert not found.errors and kinds(found) == {"qrels of train that cannot be read, and are not compared": 1}
    assert "train.tsv:2: expected 3 columns, found 4" in found.warnings[0].locations[0]
