"""The bundled reverse dictionary is parsed correctly, split without leakage, and reproducible byte for byte."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zlib
from pathlib import Path

import pytest

from index.beir import BeirDataset, read_qrels
from index.files import InputError
from scripts import DATA
from scripts.datasets import make_wordnet

BUNDLED = DATA / "wordnet"
NAMES = ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv", "qrels/dev.tsv", "qrels/test.tsv")
SATELLITE = (
    "00014490 00 s 05 abounding 0 galore(ip) 0 abundant 0 big(a) 0 much 1 001 & 00013887 a 0000 | existing in "
    'abundance; "abounding confidence"; "whiskey galore"  \n'
)
VERB = (
    "00001740 29 v 04 breathe 0 take_a_breath 0 respire 0 suspire 3 002 * 00005041 v 0000 + 03110323 a 0301 02 + 02 00 "
    '+ 08 00 | draw air into, and expel out of, the lungs; "I can breathe better when the air is clean"; "The patient '
    'is respiring"  \n'
)


def test_verb_line_gives_members_and_definition() -> None:
    synset = make_wordnet.parse_synset(VERB)
    assert (synset.id, synset.pos) == ("v-00001740", "v")
    assert synset.members == ["breathe", "take_a_breath", "respire", "suspire"]
    assert synset.definition == "draw air into, and expel out of, the lungs"


def test_satellite_is_an_adjective_without_markers() -> None:
    synset = make_wordnet.parse_synset(SATELLITE)
    assert (synset.id, synset.pos) == ("a-00014490", "a")
    assert synset.members == ["abounding", "galore", "abundant", "big", "much"]


def test_word_count_is_hexadecimal() -> None:
    words = [f"word{i}" for i in range(17)]
    line = f"00000001 05 n 11 {' '.join(f'{word} 0' for word in words)} 000 | seventeen names for one thing\n"
    assert make_wordnet.parse_synset(line).members == words


@pytest.mark.parametrize(
    ("gloss", "definition"),
    [
        ('propel, "Carry the ball"; "dribble the ball"', "propel"),
        ('penetrating no deeper than the skin: "her beauty is only skin-deep"', "penetrating no deeper than the skin"),
        ('close in; darkness enclosed him"', 'close in; darkness enclosed him"'),
        ("of beige tinged with yellow;", "of beige tinged with yellow"),
        ('spread by scattering ("straw" is archaic); "strew toys"', 'spread by scattering ("straw" is archaic)'),
        ('the exact words (e.g., "he said `I am a fool\'")  ', 'the exact words (e.g., "he said `I am a fool\'")'),
    ],
)
def test_definition_ends_at_the_first_example(gloss: str, definition: str) -> None:
    assert make_wordnet.definition_of(gloss) == definition


def test_repeated_definitions_are_one_query_in_one_split() -> None:
    twin = VERB.replace("00001740", "00001741").replace("breathe 0", "inhale 0").replace("draw air", "Draw  air")
    tables = make_wordnet.build_tables([make_wordnet.parse_synset(line) for line in (VERB, twin, SATELLITE)])
    assert [json.loads(line)["_id"] for line in tables["queries.jsonl"].splitlines()] == ["a-00014490", "v-00001740"]
    rows = [row for name in NAMES[2:] for row in tables[name].splitlines()[1:] if row.startswith("v-")]
    assert sorted(row.split("\t")[1] for row in rows) == ["breathe", "inhale", "respire", "suspire", "take_a_breath"]


def test_another_version_gives_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.noun").write_text("00001740 03 n 01 entity 0 000 | 3.1\n")
    assert make_wordnet.main(["build", "--wordnet", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "data.noun: expected WordNet 3.0" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="found other files"):
        make_wordnet.subset(BUNDLED, "verb", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_committed_files_have_the_checksums_of_the_readme() -> None:
    listed = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", (BUNDLED / "README.md").read_text(), re.MULTILINE))
    for sum_, name in ((sum_, name) for sum_, name in listed.items() if not name.startswith("data.")):
        assert hashlib.sha256(gzip.decompress((BUNDLED / f"{name}.gz").read_bytes())).hexdigest() == sum_, name
    assert set(NAMES) <= set(listed.values())


def test_no_definition_is_in_two_splits_and_every_judgement_has_its_passage() -> None:
    splits = {split: BeirDataset.open(BUNDLED, split) for split in ("train", "dev", "test")}
    corpus = [passage.id for passage in splits["test"].passages()]
    assert len(corpus) == len(set(corpus)) == 148_730
    texts = {split: {make_wordnet.normalized(t) for t in data.queries.values()} for split, data in splits.items()}
    assert not (texts["train"] & texts["test"] or texts["train"] & texts["dev"] or texts["dev"] & texts["test"])
    for split, data in splits.items():
        data.check(corpus)
        assert len(texts[split]) == len(data.queries), split
    assert [len(data.queries) for data in splits.values()] == [93_285, 11_763, 11_642]


def test_the_whole_subset_is_the_bundled_data_and_loads_in_the_beir_package(tmp_path: Path) -> None:
    from beir.datasets.data_loader import GenericDataLoader

    make_wordnet.subset(BUNDLED, "all", tmp_path / "all")
    for name in NAMES:
        assert (tmp_path / "all" / name).read_bytes() == gzip.decompress((BUNDLED / f"{name}.gz").read_bytes()), name
    corpus, queries, qrels = GenericDataLoader(str(tmp_path / "all")).load("test")
    data = BeirDataset.open(BUNDLED, "test")
    assert (queries, qrels) == (data.queries, data.qrels)
    assert {passage.id: {"title": passage.title, "text": passage.text} for passage in data.passages()} == corpus


def test_subset_keeps_verbs_and_only_verbs(tmp_path: Path) -> None:
    make_wordnet.subset(BUNDLED, "verb", tmp_path / "verbs")
    data = BeirDataset.open(tmp_path / "verbs", "test")
    passages = {passage.id for passage in data.passages()}
    data.check(passages)
    assert (len(passages), len(data.queries)) == (11_531, 1_295)
    assert "breathe" in passages and "entity" not in passages
    whole = read_qrels(BUNDLED / "qrels" / "test.tsv.gz")
    for query in (q for q in data.queries if q.startswith("v-")):
        assert {p for p in whole[query] if p in passages} == set(data.qrels[query])


def test_bundled_files_are_reproduced_byte_for_byte(tmp_path: Path) -> None:
    source = Path(os.environ.get("WORDNET_DIR", "/usr/share/wordnet"))
    if not (source / "data.noun").is_file():
        pytest.skip(f"no WordNet 3.0 in {source} (Debian package wordnet-base, or set WORDNET_DIR)")
    make_wordnet.build(source, tmp_path / "again")
    made, bundled = (
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        for folder in (tmp_path / "again", BUNDLED)
    )
    assert made == bundled
    for name in made:
        ours, theirs = (tmp_path / "again" / name).read_bytes(), (BUNDLED / name).read_bytes()
        if name.suffix == ".gz" and "ng" in zlib.ZLIB_RUNTIME_VERSION:
            ours, theirs = gzip.decompress(ours), gzip.decompress(theirs)
        assert ours == theirs, name
