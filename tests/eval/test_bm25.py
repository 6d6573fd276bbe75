"""BM25 equals Lucene's formula, is deterministic, and returns only matching passages."""

from __future__ import annotations

import math
import re
import sys

import pytest

from eval.bm25.search import K1, TOKEN, B, bm25_run
from index.files import InputError
from index.passages import Passage

CORPUS = [
    Passage("d1", "", "red fox jumps"),
    Passage("d2", "", "red red barn burning brightly today"),
    Passage("d3", "Fox", "grey wolf"),
    Passage("d4", "", "the"),
]


def lucene_bm25(words: list[str], query: list[str], corpus: list[list[str]]) -> float:
    mean = sum(map(len, corpus)) / len(corpus)
    total = 0.0
    for word in query:
        having = sum(word in document for document in corpus)
        idf = math.log(1 + (len(corpus) - having + 0.5) / (having + 0.5))
        count = words.count(word)
        total += idf * count / (count + K1 * (1 - B + B * len(words) / mean))
    return total


def test_scores_equal_lucenes_formula() -> None:
    tokens = [
        ["red", "fox", "jumps"],
        ["red", "red", "barn", "burning", "brightly", "today"],
        ["fox", "grey", "wolf"],
        [],
    ]
    run = bm25_run(CORPUS, {"q": "the RED fox"})
    expected = {f"d{i}": lucene_bm25(words, ["red", "fox"], tokens) for i, words in enumerate(tokens[:3], 1)}
    assert run["q"] == pytest.approx(expected, rel=1e-5)
    assert next(iter(run["q"])) == "d1"


def test_queries_without_a_match_have_empty_results() -> None:
    assert bm25_run(CORPUS, {"q1": "zebra", "q2": "the", "q3": "wolf"}) == {
        "q1": {},
        "q2": {},
        "q3": bm25_run(CORPUS, {"q3": "wolf"})["q3"],
    }


def test_ties_at_the_cut_off_are_broken_by_id_descending() -> None:
    corpus = [Passage(f"d{i:02}", "", "same words") for i in (5, 31, 2, 17, 40, 9)]
    assert list(bm25_run(corpus, {"q": "same"}, k=3)["q"]) == ["d40", "d31", "d17"]
    assert bm25_run(corpus[::-1], {"q": "same"}, k=3) == bm25_run(corpus, {"q": "same"}, k=3)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("it's a red-brown fox_2", ["it", "red", "brown", "fox_2"]),
        ("北京的天气 iPhone手机", ["北", "京", "的", "天", "气", "iPhone", "手", "机"]),
        ("東京タワーへ行く", ["東", "京", "タワー", "へ", "行", "く"]),
        ("서울의 날씨", ["서울의", "날씨"]),
        ("größer, Straße", ["größer", "Straße"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),
        ("cre\u0300me a\u0301 e", ["cre\u0300me", "a\u0301"]),
    ],
)
def test_tokens_of_several_scripts(text: str, tokens: list[str]) -> None:
    assert re.findall(TOKEN, text) == tokens


def test_stop_words_follow_the_requested_language() -> None:
    corpus = [Passage("d1", "", "der Hund"), Passage("d2", "", "the dog")]
    queries = {"q": "der the"}
    found = {language: list(bm25_run(corpus, queries, stopwords=language)["q"]) for language in ("en", "de", None)}
    assert found == {"en": ["d1"], "de": ["d2"], None: ["d2", "d1"]}
    with pytest.raises(InputError, match=r"stop words: expected a language that bm25s .* knows .*, found xx"):
        bm25_run(corpus, queries, stopwords="xx")


def test_progress_counts_queries() -> None:
    seen: list[int] = []
    bm25_run(CORPUS, {"a": "fox", "b": "zebra"}, progress=seen.append)
    assert sum(seen) == 2


def test_a_corpus_of_stop_words_gives_empty_results() -> None:
    assert bm25_run([Passage("d1", "", "the")], {"q": "fox the"}) == {"q": {}}


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="expected passages"):
        bm25_run([], {"q": "fox"})
    with pytest.raises(ValueError, match="k: expected at least 1"):
        bm25_run(CORPUS, {"q": "fox"}, k=0)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match=r'pip install "dense-retriever\[bm25\]"'):
        bm25_run(CORPUS, {"q": "fox"})
