"""The bundled held-out sets are parsed correctly, without leaks, fully judged, and reproducible byte for byte."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import zlib
from pathlib import Path
from types import ModuleType

import pytest

from index.beir import BeirDataset
from scripts import DATA
from scripts.datasets import make_jargon, make_perlfaq, pod

BUILDERS = {"jargon": make_jargon, "perlfaq": make_perlfaq}
SOURCES = {"jargon": ("--dictd", "/usr/share/dictd"), "perlfaq": ("--pod", "/usr/share/perl/5.36.0/pod")}
NAMES = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")

ZAP = """ n.,vt.

    1. [common] To zap something that a program left over, esp. in the
    {arena} or by means of e.g. a {patch}. “You zapped my file!” She
    was zapping blocks all night long, and no zap hit the wrong block, though
    the operator had feared for the worst and kept his tapes.

    2. Spiciness of food, which hackers like very much indeed.
"""


def test_entries_are_split_after_the_first_sentence_and_masked() -> None:
    entry = make_jargon.cut("zap", ZAP)
    assert entry.first == "To ~ something that a program left over, esp. in the arena or by means of e.g. a patch."
    assert entry.rest.startswith("“You ~ my file!” She was ~ blocks all night long, and no ~ hit")
    assert entry.rest.endswith("kept his tapes.")


@pytest.mark.parametrize(
    ("headword", "text", "left"),
    [
        ("code", "Coding codes a coder coded: code, decode, codify", "~ ~ a ~ ~: ~, decode, codify"),
        ("black hole", "Black-Holes and black hole's holes", "~ and ~ holes"),
        ("AFAIK", "afaik, AFAIKs", "~, ~"),
        ("/dev/null", "to /dev/null with dev/null", "to /~ with ~"),
        ("2", "2 of 20", "~ of 20"),
        ("foo", "food, foobar, foo!", "food, foobar, ~!"),
    ],
)
def test_headwords_are_masked_in_usual_forms(headword: str, text: str, left: str) -> None:
    assert make_jargon.masked(text, headword) == left


def test_short_entries_are_left_out() -> None:
    assert make_jargon.cut("alt bit", " /awlt bit/, adj.\n\n    See {meta bit}.") is None


def test_equal_first_sentences_are_one_query() -> None:
    entries = [make_jargon.Entry(head, "The same thing, said of two.", f"rest of {head}") for head in ("b c", "a", "a")]
    tables = make_jargon.build_tables(entries)
    assert tables["queries.jsonl"].count("\n") == 1
    rows = [line.split("\t") for line in tables["qrels/test.tsv"].splitlines()[1:]]
    assert rows == [["q-a", "a", "1"], ["q-a", "a-2", "1"], ["q-a", "b_c", "1"]]


def test_formatting_codes_are_removed_and_links_kept() -> None:
    text = (
        'C<< $a->{b} >>, B<I<very> S<bold>>X<bold>, E<lt>E<233>E<gt> and L<the op|perlop/"X<y> C<m//>"> or L<perlre>.'
    )
    assert pod.plain(text) == "$a->{b}, very bold, <é> and the op or perlre."
    assert list(pod.links(text)) == [("perlop", "m//")]
    assert pod.plain('L<perlop/"Gory details">, L<http://a.b/c>') == '"Gory details" in perlop, http://a.b/c'


def test_items_are_sections_only_on_request() -> None:
    page = (
        "=head1 List\n\n=over\n\n=item open FH\n\n=item open\n\nOpens.\n\n    code();\n\n=item close\n\nShuts.\n\n=back"
    )
    assert [s.headings for s in pod.sections(page, items=True)] == [["List"], ["open FH", "open"], ["close"]]
    (whole,) = pod.sections(page)
    assert whole.text == "open FH\n\nopen\n\nOpens.\n\n    code();\n\nclose\n\nShuts."


def test_answers_have_grade_2_and_linked_sections_1() -> None:
    faq = (
        "=head1 Data\n\n=head2 How do I open?\n\nUse the function of that name: L<perlfunc/open>, L<perlop>, please.\n"
    )
    manual = (
        "=over\n\n=item open FH,MODE\n\nOpens the file that is named.\n\n=item close FH\n\nCloses the file, or fails."
    )
    pages = {
        "perlfaq4": list(pod.sections(faq)),
        "perlfunc": list(pod.sections("=head1 All\n\nThe list of them all.\n\n" + manual, items=True)),
    }
    tables = make_perlfaq.build_tables(pages)
    rows = [line.split("\t") for line in tables["qrels/test.tsv"].splitlines()[1:]]
    assert rows == [["q-perlfaq4-2", "perlfunc-2", "1"], ["q-perlfaq4-2", "perlfaq4-2", "2"]]
    assert "How do I open" not in tables["corpus.jsonl"] and "open FH,MODE" in tables["corpus.jsonl"]


@pytest.mark.parametrize("name", BUILDERS)
def test_committed_files_have_the_checksums_of_their_readme(name: str) -> None:
    folder = DATA / name
    listed = {
        file: sum_ for sum_, file in re.findall(r"^([0-9a-f]{64})  (\S+)$", (folder / "README.md").read_text(), re.M)
    }
    for file in NAMES:
        assert hashlib.sha256(gzip.decompress((folder / f"{file}.gz").read_bytes())).hexdigest() == listed[file], file
    assert BUILDERS[name].SOURCES.items() <= listed.items()
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 3_000_000


@pytest.mark.parametrize(("name", "passages", "queries"), [("jargon", 1095, 1095), ("perlfaq", 2282, 304)])
def test_every_query_is_judged_and_no_answer_contains_its_question(name: str, passages: int, queries: int) -> None:
    data = BeirDataset.open(DATA / name)
    texts = {passage.id: passage.text for passage in data.passages()}
    assert (len(texts), len(set(texts.values())), len(data.queries)) == (passages, passages, queries)
    data.check(texts)
    for query, grades in data.qrels.items():
        asked = " ".join(make_jargon.words(data.queries[query]))
        assert max(grades.values()) > 0
        for passage in grades:
            assert asked not in " ".join(make_jargon.words(texts[passage])), query


def test_no_article_contains_its_headword() -> None:
    data = BeirDataset.open(DATA / "jargon")
    for passage in data.passages():
        headword = passage.id.replace("_", " ")
        assert not make_jargon.headword_pattern(headword).search(passage.text), headword


@pytest.mark.parametrize("name", BUILDERS)
def test_unpacked_folder_loads_in_the_beir_package(name: str, tmp_path: Path) -> None:
    from beir.datasets.data_loader import GenericDataLoader

    assert BUILDERS[name].main(["unpack", "--out", str(tmp_path / name)]) == 0
    corpus, queries, qrels = GenericDataLoader(str(tmp_path / name)).load("test")
    data = BeirDataset.open(DATA / name)
    assert (queries, qrels) == (data.queries, data.qrels)
    assert {passage.id: {"title": passage.title, "text": passage.text} for passage in data.passages()} == corpus


@pytest.mark.parametrize("name", BUILDERS)
def test_other_sources_and_foreign_folders_are_refused_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build: ModuleType = BUILDERS[name]
    flag, _ = SOURCES[name]
    file = next(iter(build.SOURCES))
    assert build.main(["build", flag, str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert f"{file}: no such file; expected the files of Debian's package" in capsys.readouterr().err
    (tmp_path / file).write_text("another version")
    assert build.main(["build", flag, str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"{file}: expected that of" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert build.main(["unpack", "--out", str(tmp_path)]) == 1
    assert "found other files" in capsys.readouterr().err and (tmp_path / file).read_text() == "another version"


@pytest.mark.parametrize("name", BUILDERS)
def test_bundled_files_are_reproduced_byte_for_byte(name: str, tmp_path: Path) -> None:
    flag, usual = SOURCES[name]
    source = Path(os.environ.get(f"{name.upper()}_DIR", usual))
    if not (source / next(iter(BUILDERS[name].SOURCES))).is_file():
        pytest.skip(f"no {BUILDERS[name].PACKAGE} in {source} (install Debian's package, or set {name.upper()}_DIR)")
    assert BUILDERS[name].main(["build", flag, str(source), "--out", str(tmp_path / "again")]) == 0
    bundled = DATA / name
    made = sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file())
    assert made == sorted(path.relative_to(bundled) for path in bundled.rglob("*") if path.is_file())
    for file in made:
        ours, theirs = (tmp_path / "again" / file).read_bytes(), (bundled / file).read_bytes()
        if file.suffix == ".gz" and "ng" in zlib.ZLIB_RUNTIME_VERSION:
            ours, theirs = gzip.decompress(ours), gzip.decompress(theirs)
        assert ours == theirs, file
