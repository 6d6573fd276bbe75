"""All known pairs are masked, in one process and over several ranks."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.files import InputError
from retriever.config.sources import SourceConfig
from retriever.data import false_negatives, known_positives
from retriever.data.batches import BatchDataset, PairKeys, Prompts, TrainingBatch
from retriever.data.false_negatives import FalseNegatives, find_false_negatives, number_texts
from retriever.data.known_positives import KnownPositives, open_known_positives, text_digests
from retriever.data.micro_batches import PreparedBatch
from retriever.data.passage_choice import PassageSettings
from retriever.data.pool_false_negatives import with_pool_false_negatives
from retriever.data.schedules.schedule import BatchSchedule
from retriever.data.table import ExampleTable, open_source
from retriever.distributed.ranks import Ranks

NONE = np.empty((0, 2), dtype=np.int64)
SAME = [{0, 2, 4}, {1}, {0, 2, 4}, {3}, {0, 2, 4}, {5}]

letters = st.sampled_from("abcdefgh")
pair_lists = st.lists(st.tuples(letters, letters), max_size=12)


def masked(found: FalseNegatives) -> np.ndarray:
    """Return bool [M, N]: the entries that the loss masks, and the queries' own positives."""
    entries = found.query_ids[:, None] == found.passage_ids
    entries[tuple(found.excluded.T)] = True
    return entries


def of_letters(pairs: list[tuple[str, str]], negatives: list[str], known: list[tuple[str, str]]) -> FalseNegatives:
    queries, positives = zip(*pairs, strict=True)
    return find_false_negatives(
        np.array([ord(text) for text in queries]),
        np.array([ord(text) for text in positives]),
        np.array([ord(text) for text in negatives], dtype=np.int64),
        np.array([[ord(a), ord(b)] for a, b in known], dtype=np.int64).reshape(-1, 2),
    )


@settings(deadline=None)
@given(pairs=pair_lists.filter(bool), negatives=st.lists(letters, max_size=6), known=pair_lists)
def test_exactly_the_known_pairs_are_masked(
    pairs: list[tuple[str, str]], negatives: list[str], known: list[tuple[str, str]]
) -> None:
    found = of_letters(pairs, negatives, known)
    known_pairs = {*pairs, *known}
    passages = [positive for _, positive in pairs] + negatives
    expected = np.array([[(query, text) in known_pairs for text in passages] for query, _ in pairs])
    np.testing.assert_array_equal(masked(found), expected)
    # The loss refuses a query's own positive in `excluded`.
    assert not (found.excluded[:, 0] == found.excluded[:, 1]).any()
    assert found.query_ids.dtype == found.passage_ids.dtype == found.excluded.dtype == np.int64
    others = expected & ~np.eye(len(pairs), len(passages), dtype=bool)
    assert found.any or not others.any()
    assert found.no_negatives == expected.all()


@settings(deadline=None)
@given(pairs=pair_lists.filter(bool), negatives=st.lists(letters, max_size=6), known=pair_lists)
def test_all_known_pairs_are_masked_with_too_many_pairs_for_a_list(
    pairs: list[tuple[str, str]], negatives: list[str], known: list[tuple[str, str]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(false_negatives, "MAX_PAIRS_PER_QUERY", 0)
        patch.setattr(false_negatives, "MAX_PAIRS", 0)
        found = of_letters(pairs, negatives, known)
    known_pairs = {*pairs, *known}
    passages = [positive for _, positive in pairs] + negatives
    expected = np.array([[(query, text) in known_pairs for text in passages] for query, _ in pairs])
    assert not len(found.excluded)
    assert masked(found)[expected].all()


def test_passages_of_one_label_need_no_excluded_pairs() -> None:
    queries, positives = np.arange(4000) % 5, np.arange(4000)
    known = np.stack([queries, positives], axis=1)
    found = find_false_negatives(queries, positives, np.empty(0, np.int64), known)
    assert not len(found.excluded)
    np.testing.assert_array_equal(found.query_ids[:, None] == found.passage_ids, queries[:, None] == queries)


def test_passages_with_many_queries_remain_negatives_of_other_queries() -> None:
    """There are 30 queries. Each passage is a positive of 9 of them, so that all are connected."""
    generator = np.random.default_rng(0)
    tags = np.stack([generator.permutation(30)[:9] for _ in range(512)])
    known = np.stack([tags.reshape(-1), np.repeat(np.arange(512), 9)], axis=1)
    found = find_false_negatives(tags[:, 0], np.arange(512), np.empty(0, np.int64), known)
    answers = np.zeros((30, 512), bool)
    answers[tuple(known.T)] = True
    np.testing.assert_array_equal(masked(found), answers[tags[:, 0]])
    assert not found.no_negatives


@pytest.mark.parametrize("number", [number_texts, text_digests])
def test_texts_that_differ_only_in_white_space_have_equal_keys(number: Callable[[list[str]], np.ndarray]) -> None:
    texts = ["b c", "a", " b\n c\t", "bc", "b\u00a0 c", "A"]
    found = number(texts)
    np.testing.assert_array_equal(found[:, None] == found, [[i in same for i in range(6)] for same in SAME])


def test_duplicates_with_other_white_space_are_not_negatives(tmp_path: Path) -> None:
    rows = [("q", ["a b"], []), ("r ", ["c"], ["n"]), ("s", ["a  b "], []), ("r", ["d"], ["a\nb"])]
    tables = [converted(tmp_path, "rows", rows)]
    known = open_known_positives(tables, tmp_path / "cache")
    for index in (known, None):
        data = BatchDataset(
            tables,
            BatchSchedule([4], batch_size=4, seed=0, epochs=2),
            as_given,
            passages=PassageSettings(negatives=1),
            known=index,
        )
        known_pairs = {("q", "a b"), ("s", "a b")} | {("r", "c"), ("r", "d")}
        for step in range(len(data)):
            batch = data.batch(step)
            assert batch.false_negatives is not None
            expected = [
                [(query.strip(), " ".join(text.split())) in known_pairs for text in batch.passages]
                for query in batch.queries
            ]
            np.testing.assert_array_equal(masked(batch.false_negatives), expected)


class FakeRanks(Ranks):
    """Ranks whose collective returns the given keys of all ranks."""

    keys_of_ranks: ClassVar[list[PairKeys]] = []

    def all_gather_rows(self, rows: np.ndarray) -> list[np.ndarray]:
        kinds = {"queries": 0, "positives": 1, "negatives": 2}
        mine = self.keys_of_ranks[self.rank]
        for kind in kinds:
            if getattr(mine, kind) is rows:
                return [getattr(keys, kind) for keys in self.keys_of_ranks]
        return [keys.known.reshape(-1) for keys in self.keys_of_ranks]


class FakeKnownPositives:
    """KnownPositives with given pairs."""

    def __init__(self, known: np.ndarray) -> None:
        self.known = known

    def pairs(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        return self.known


@settings(deadline=None)
@given(st.data())
def test_masks_of_several_ranks_equal_those_of_one_process(data: st.DataObject) -> None:
    pairs = st.lists(st.tuples(letters, letters), min_size=1, max_size=4)
    shard = st.tuples(pairs, st.lists(letters, max_size=3), pair_lists)
    shards = data.draw(st.lists(shard, min_size=2, max_size=4))
    everywhere = data.draw(st.one_of(st.none(), pair_lists))

    def integers(texts: object) -> np.ndarray:
        return np.array([[ord(each) for each in text] for text in texts], dtype=np.int64)

    FakeRanks.keys_of_ranks = [
        PairKeys(
            integers([q for q, _ in some]).reshape(-1),
            integers([p for _, p in some]).reshape(-1),
            integers(more).reshape(-1),
            integers(known).reshape(-1, 2),
        )
        for some, more, known in shards
    ]
    index = None if everywhere is None else FakeKnownPositives(integers(everywhere).reshape(-1, 2))
    found = [
        with_pool_false_negatives(
            PreparedBatch([], len(keys.queries), None, keys=keys), FakeRanks(rank, len(shards)), index
        ).false_negatives
        for rank, keys in enumerate(FakeRanks.keys_of_ranks)
    ]
    assert len({each.any for each in found if each is not None}) == 1
    no_negatives = {each.no_negatives for each in found if each is not None}
    # The pool: positives and negatives of each rank, in rank order.
    pool = [text for some, more, _ in shards for text in [*(p for _, p in some), *more]]
    known_pairs = {pair for some, _, known in shards for pair in [*some, *known]} | set(everywhere or [])
    pool_ids = np.concatenate([each.passage_ids for each in found if each is not None])
    for each, (some, _, _) in zip(found, shards, strict=True):
        assert each is not None
        entries = each.query_ids[:, None] == pool_ids
        entries[tuple(each.excluded.T)] = True
        np.testing.assert_array_equal(entries, [[(query, text) in known_pairs for text in pool] for query, _ in some])
    queries = [query for some, _, _ in shards for query, _ in some]
    assert no_negatives == {all((query, text) in known_pairs for query in queries for text in pool)}


def converted(folder: Path, name: str, rows: list[tuple[str, list[str], list[str]]]) -> ExampleTable:
    path = folder / f"{name}.jsonl"
    lines = ({"query": query, "positive": positives, "negatives": negatives} for query, positives, negatives in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open_source(SourceConfig(str(path)), folder / "cache")


def letters_of(known: KnownPositives, queries: str, passages: str) -> set[tuple[str, str]]:
    names = {int(text_digests([text])[0]): text for text in "abcdefghijklmnop"}
    return {(names[a], names[b]) for a, b in known.pairs(text_digests(queries), text_digests(passages)).tolist()}


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(letters, st.lists(letters, min_size=1, max_size=3)), min_size=1, max_size=30))
@pytest.mark.parametrize("at_once", [2**22, 4])
def test_all_positives_of_a_query_are_found_over_rows_and_sources(
    at_once: int, rows: list[tuple[str, list[str]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("known")
    half = -(-len(rows) // 2)
    parts = [[(query, positives, []) for query, positives in some] for some in (rows[:half], rows[half:]) if some]
    tables = [converted(folder, str(number), some) for number, some in enumerate(parts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_positives, "SORT_PAIRS", at_once)
        known = open_known_positives(tables, folder / "cache")
    pairs = {(query, text) for query, positives in rows for text in positives}
    several = {query for query, _ in pairs if sum(other == query for other, _ in pairs) > 1}
    expected = {(query, text) for query, text in pairs if query in several}
    assert len(known) == len(several)
    assert letters_of(known, "abcdefghz", "abcdefghz") == expected
    # With fewer passages than a query has positives.
    assert letters_of(known, "abcdefgh", "b") == {(query, text) for query, text in expected if text == "b"}
    copy = pickle.loads(pickle.dumps(known))  # noqa: S301
    assert letters_of(copy, "abcdefgh", "abcdefgh") == expected
    assert not list((folder / "cache").glob("*.tmp*"))


def test_a_damaged_file_of_known_positives_is_refused(tmp_path: Path) -> None:
    tables = [converted(tmp_path, "a", [("q", ["x", "y"], []), ("r", ["x"], [])])]
    known = open_known_positives(tables, tmp_path / "cache")
    whole = known.path.read_bytes()
    for damaged in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1]), whole[:150], b"", b"PK\3\4"):
        known.path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"known-\w+\.npy: (damaged|cannot be read)"):
            open_known_positives(tables, tmp_path / "cache")
    known.path.unlink()
    assert len(open_known_positives(tables, tmp_path / "cache")) == 1


def as_given(batch: TrainingBatch) -> TrainingBatch:
    return batch


@pytest.mark.parametrize("prompts", [None, [Prompts("query: ", "passage: ")]])
def test_positives_that_were_not_drawn_are_masked_as_mined_negatives(
    tmp_path: Path, prompts: list[Prompts] | None
) -> None:
    rows = [("q", ["a", "b"], []), ("r", ["b"], ["n"]), ("s", ["c"], ["a"]), ("q", ["c"], ["b", "m"])]
    tables = [converted(tmp_path, "rows", rows)]
    known = open_known_positives(tables, tmp_path / "cache")
    schedule = BatchSchedule([4], batch_size=4, seed=0, epochs=20)
    data = BatchDataset(tables, schedule, as_given, prompts=prompts, passages=PassageSettings(negatives=2), known=known)
    known_pairs = {("q", "a"), ("q", "b"), ("q", "c"), ("r", "b"), ("s", "c")}
    for step in range(len(data)):
        batch = data.batch(step)
        assert batch.false_negatives is not None and batch.keys is None
        queries = [text.removeprefix("query: ") for text in batch.queries]
        passages = [text.removeprefix("passage: ") for text in batch.passages]
        expected = [[(query, text) in known_pairs for text in passages] for query in queries]
        np.testing.assert_array_equal(masked(batch.false_negatives), expected)
