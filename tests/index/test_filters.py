"""A filtered search finds what filtering the full result finds, and follows passages through every change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.ann.build import build
from index.ann.edit import add_passages, delete_passages
from index.ann.index import Index
from index.ann.multi_index import MultiIndex
from index.fields.filters import Filter, FilterError, as_filter
from index.fields.values import check_field_names
from index.files import InputError
from index.passages import Passage, PassageFile
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter

N, D = 600, 16
LANGUAGES = ("de", "en", "fr")


def fields_of(row: int) -> dict[str, Any]:
    return {
        "year": 1990 + row % 30,
        "lang": LANGUAGES[row % 3],
        "rank": None if row % 7 == 0 else row / 8,
        "open": row % 2 == 0,
        "tags": [f"t{row % 4}", f"t{row % 5}"] if row % 6 else [],
    }


def passage(row: int) -> Passage:
    return Passage(f"d{row:04d}", "", f"text {row}", fields_of(row))


def write_store(folder: Path, rows: range, seed: int = 0) -> EmbeddingStore:
    """Vectors of small whole numbers: their products are exact, in any order of summation."""
    vectors = np.random.default_rng(seed).integers(-8, 9, (len(rows), D)).astype(np.float32)
    with EmbeddingWriter(folder, dim=D, model={"sha256": "m"}, source={}, shard_rows=250) as writer:
        writer.append([passage(row) for row in rows], vectors)
    return EmbeddingStore.open(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write_store(tmp_path_factory.mktemp("filters") / "store", range(N))


@pytest.fixture(scope="module")
def index(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("filters") / "flat"
    build(store, folder, factory="Flat")
    return Index.open(folder)


CASES: list[tuple[Any, Callable[[dict[str, Any]], bool]]] = [
    ({"lang": "en"}, lambda f: f["lang"] == "en"),
    ("lang=en year>=2010", lambda f: f["lang"] == "en" and f["year"] >= 2010),
    ({"year": {"$gt": 1995, "$lte": 2000.5}}, lambda f: 1995 < f["year"] <= 2000),
    ({"rank": {"$lt": 20}}, lambda f: f["rank"] is not None and f["rank"] < 20),
    ({"rank": {"$ne": 1.0}}, lambda f: f["rank"] != 1.0),
    ({"rank": {"$exists": False}}, lambda f: f["rank"] is None),
    ({"lang": {"$in": ["de", "xx"]}}, lambda f: f["lang"] == "de"),
    ({"lang": {"$nin": ["de", "fr"]}}, lambda f: f["lang"] == "en"),
    ({"tags": "t3"}, lambda f: "t3" in f["tags"]),
    ({"tags": {"$nin": ["t1", "t2"]}}, lambda f: not {"t1", "t2"} & set(f["tags"])),
    ("open=false lang!=fr", lambda f: not f["open"] and f["lang"] != "fr"),
    ({"$or": [{"year": 1991}, {"$not": {"open": True}}]}, lambda f: f["year"] == 1991 or not f["open"]),
    ('{"$and": [{"lang": "de"}, {"year": {"$lt": 1992}}]}', lambda f: f["lang"] == "de" and f["year"] < 1992),
    ({"lang": {"$gt": "de"}}, lambda f: f["lang"] > "de"),
    ({"year": 1.5}, lambda f: False),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_filtered_exact_search_equals_filtering_the_full_result(index: Index, case: int) -> None:
    condition, matches = CASES[case]
    queries = np.random.default_rng(1).integers(-8, 9, (5, D)).astype(np.float32)
    all_scores, all_ids = index.search(queries, N)
    kept = np.array([[matches(fields_of(int(id_[1:]))) for id_ in row] for row in all_ids])
    for k in (1, 10, N):
        scores, ids = index.search(queries, k, filter=condition)
        assert scores.shape == ids.shape == (5, k)
        for query in range(5):
            expected = all_ids[query][kept[query]][:k]
            assert ids[query, : len(expected)].tolist() == expected.tolist()
            assert (scores[query, : len(expected)] == all_scores[query][kept[query]][:k]).all()
            assert (ids[query, len(expected) :] == "").all() and np.isinf(scores[query, len(expected) :]).all()


@pytest.mark.parametrize("factory", ["IVF16,Flat", "PCA8,IVF8,SQ8,RFlat", "HNSW8", "SQ8", "PQ4x4fs"])
def test_approximate_indexes_find_only_matches_and_enough_of_them(
    store: EmbeddingStore, factory: str, tmp_path: Path
) -> None:
    build(store, tmp_path / "index", factory=factory)
    index = Index.open(tmp_path / "index")
    queries = np.random.default_rng(2).standard_normal((4, D)).astype(np.float32)
    if factory == "PQ4x4fs":
        with pytest.raises(FilterError, match="faiss cannot search PQ4x4fs with one"):
            index.search(queries, 10, filter="lang=en")
        return
    for condition, matching in (("lang=en", 200), ("year=2003 lang=en", 20), ("year=2003", 20), ("year=1", 0)):
        _, ids = index.search(queries, 30, filter=condition)
        rows = [[int(id_[1:]) for id_ in found if id_] for found in ids]
        where = {"lang=en": lambda f: f["lang"] == "en", "year=1": lambda f: False}
        matches = where.get(condition, lambda f: f["year"] == 2003)
        assert all(matches(fields_of(row)) for found in rows for row in found)
        assert [len(set(found)) for found in rows] == [min(30, matching)] * 4, condition


def test_fields_follow_their_passages_when_an_index_changes(store: EmbeddingStore, tmp_path: Path) -> None:
    build(store, tmp_path / "index", factory="Flat")
    more = write_store(tmp_path / "more", range(N, N + 60), seed=3)
    add_passages(tmp_path / "index", more)
    delete_passages(tmp_path / "index", [f"d{row:04d}" for row in range(0, N, 2)])
    index = Index.open(tmp_path / "index", verify="hash")
    queries = np.ones((1, D), np.float32)
    _, ids = index.search(queries, 1000, filter={"year": 2003})
    expected = {f"d{row:04d}" for row in (*range(1, N, 2), *range(N, N + 60)) if fields_of(row)["year"] == 2003}
    assert {id_ for id_ in ids[0] if id_} == expected
    row = index.ids.index("d0607")
    assert index.passage(row) == passage(607)
    build(more, tmp_path / "second", factory="Flat")
    delete_passages(tmp_path / "index", more.ids()[:])
    both = MultiIndex.open([tmp_path / "index", tmp_path / "second"])
    assert {id_ for id_ in both.search(queries, 1000, filter={"year": 2003})[1][0] if id_} == expected


def test_wrong_filters_are_refused_by_name(index: Index, store: EmbeddingStore, tmp_path: Path) -> None:
    queries = np.ones((1, D), np.float32)
    for condition, message in (
        ({"yaer": 5}, "field: expected one of year, lang, rank, open, tags, found 'yaer'"),
        ({"year": "x"}, "year: expected a number, found 'x'"),
        ("year>=x", "year: expected a number, found 'x'"),
        ({"lang": 5}, "lang: expected text, found 5"),
        ({"open": 1}, "open: expected true or false, found 1"),
        ({"tags": {"$gt": "a"}}, r"tags: expected \$eq, .* for texts, found \$gt"),
        ({"year": {"$near": 1}}, r"year: expected \$eq, .*, found '\$near'"),
        ({"year": {}}, r"year: expected \$eq, .*, found none"),
        ({"$xor": []}, r"expected a field or \$and, \$or, \$not, found '\$xor'"),
        ({"$and": []}, r"\$and: expected a list of filters, found"),
        ({}, "expected an object with a field or more"),
        ({"year": None}, "year: expected text, a number, true or false, found None"),
        ({"year": {"$in": 5}}, r"year: \$in: expected a list"),
        ("year", "expected a condition such as"),
        ("lang='x", "expected conditions such as lang=en, found: No closing quotation"),
        ('{"year"', "expected JSON"),
        ({"$and": [{"year": 1}] * 200}, "expected at most 100 conditions"),
    ):
        with pytest.raises(FilterError, match=f"^filter: {message}"):
            index.search(queries, 3, filter=condition)
    nested: dict[str, Any] = {"year": 1}
    for _ in range(5000):
        nested = {"$not": nested}
    with pytest.raises(FilterError, match="at most 100"):
        Filter(nested)
    assert as_filter(" ") is None and as_filter("a=1") == Filter({"a": {"$eq": "1"}})
    with EmbeddingWriter(tmp_path / "plain", dim=D, model={"sha256": "m"}, source={}) as writer:
        writer.append([Passage("a", "", "b")], queries)
    build(EmbeddingStore.open(tmp_path / "plain"), tmp_path / "plain_index", factory="Flat")
    assert not (tmp_path / "plain_index" / "fields.parquet").exists()
    with pytest.raises(FilterError, match="expected passages with fields, found none"):
        Index.open(tmp_path / "plain_index").search(queries, 1, filter="a=1")


def test_fields_are_read_from_corpora_and_refused_where_they_cannot_be_kept(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"_id": "a", "text": "x", "metadata": {"year": 5, "deep": {"x": [1]}}}, {"_id": "b", "text": "y"}]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["metadata.year"]
    check_field_names(corpus, names)
    assert [dict(each.fields) for each in PassageFile(corpus, names)] == [{"metadata.year": 5}, {"metadata.year": None}]
    for wrong, message in (
        (["yaer"], "expected the field 'yaer' in one of the first 1000 rows, found metadata"),
        (["text"], "expected different names other than _id, id, title, text, found 'text'"),
        (["metadata.year"] * 2, "found 'metadata.year'"),
    ):
        with pytest.raises(InputError, match=message):
            check_field_names(corpus, wrong)
    with pytest.raises(InputError, match=r"corpus.jsonl:1: field 'metadata.deep': expected text, .*, found \{'x'"):
        list(PassageFile(corpus, ["metadata.deep"]))
    with EmbeddingWriter(tmp_path / "mixed", dim=1, model={"sha256": "m"}, source={}) as writer:
        values = [Passage("a", "", "", {"f": None}), Passage("b", "", "", {"f": "x"}), Passage("c", "", "", {"f": 1})]
        writer.append(values, np.ones((3, 1), np.float32))
    with pytest.raises(InputError, match=r"passages.jsonl:3: field 'f': expected values of one type, found integer"):
        build(EmbeddingStore.open(tmp_path / "mixed"), tmp_path / "index", factory="Flat")
