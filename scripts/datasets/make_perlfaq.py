"""Builds the bundled question-answering set from the Perl FAQ and the Perl manual, as a BEIR folder."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from scripts import DATA
from scripts.datasets.held_out import checked_source, checksums, finish, tables_of, unpack, write_bundled
from scripts.datasets.pod import Section, sections

BUNDLED = DATA / "perlfaq"
PACKAGE = "perl-doc (5.36.0)"
FAQ = tuple(f"perlfaq{number}" for number in range(1, 10))
# Pages whose outermost list items are sections.
LISTS = ("perlfunc", "perlvar", "perlglossary")
ANSWER, POINTED_AT = 2, 1
LICENSE_PAGE = "perlartistic"
SOURCES = {
    "perlfaq1.pod": "5594e215d3ab6279e825f6b228fef943ecb519893113e98b4c5acb0ad070b661",
    "perlfaq2.pod": "e8f6f3828f28e490763452113c782ca81f2e4e8792cd8018f63811773ed29c5c",
    "perlfaq3.pod": "f5c812a24b021a276ed9f8e7ad7289543e77378351c07427ea469d7e458cd797",
    "perlfaq4.pod": "65fe9085fd9b2f581c95258c6ad3a32297dff93926844b69c4065394df745f64",
    "perlfaq5.pod": "c9600780efef6d7d8e8a189c26eac678e2c0e6e7148d96f37dc7ed9a83df4829",
    "perlfaq6.pod": "37c8773cfd7872c09f0c1790b79755b785054ad7cad5946313803d5ff3047047",
    "perlfaq7.pod": "a58214900fec0593db56d72aec1c5bbc185e56a3f295386ecbfcd4ddef36d9e7",
    "perlfaq8.pod": "f033e1d0002e9dc8ad70d090b73e02d0203fa9fb0fa62d71afb6777136cc7ef9",
    "perlfaq9.pod": "d14aad0049e0246556248b6a7e6f71a2f10833dd68d3c1fad4972f8aa9d1acff",
    "perlartistic.pod": "137c097d0615aea42eda7a5087baa3f81aab1a431b9046d5e858e8c8c31987c0",
    "perlbook.pod": "0615f38e11cf3e67206121a5933cfba45abcc5ea97f2e9d54b531c510f65e9ae",
    "perlcall.pod": "dd754953444c62e8518389467ad8009501e8153f5c7cc6c2336cd552c1004a35",
    "perlcommunity.pod": "f65823a18e0cb5a5166ec1922ba42e1df9045ab2fb13d39ad4eab9dbcb0fb330",
    "perldata.pod": "3bed0fd731e01c5a84c7f614b41734981dd1b18275f77888db36adef04b32462",
    "perldbmfilter.pod": "390cee5688469cbbc3a76fcaf998e758e5c22acd11e15229bb44ce662897571e",
    "perldebtut.pod": "f335a0cb8ba9b945bc0974cef16ab185bc3140572db7886f46c9d7721e6aee03",
    "perldebug.pod": "104c131ee44ca37bd566851fe76e50717a9b1454556097a322f05fa0dd95568e",
    "perldoc.pod": "8ce282c109995897bf9a6ac4cfdab590819f65ef5a488fcc6aea9d33359feba0",
    "perldsc.pod": "48efbc1680016d0e96b82e46e01aa38c06611db216e80a6c22c9f701ed05449a",
    "perlembed.pod": "dc4491aabe5cb8cafd900c9fac787248ef907ca09d32786d63e8194eaf15184a",
    "perlfork.pod": "041db2285aed20c33415d9d40eeb35397a4a5cefc53082f53c23c3936a7e51d6",
    "perlform.pod": "4321ffdc99802a742d14d351a224b93ab2628a53f1aa4b30c80aa00481672af9",
    "perlfunc.pod": "a9b626c76d21cdf841fd771803094fb32e2ad550be0cc4d9acd5413755161d37",
    "perlglossary.pod": "4f45fa311bfe37d86891e7ce634a2679552ca5528aa15d9446dd751dc4c294e0",
    "perlintro.pod": "0fcd5a61e6a7c6de11539f082ca453b6234aadb8918fc6c078b658e179eefa19",
    "perlipc.pod": "5ef4a207879bb6afd9c58c2924d0c6437617efdaa3d02ade9a688d9bbca97a25",
    "perllocale.pod": "f316c0d8d5afa900c77edc770f98f45212c4883f486501d8c26f8aee4c6e1fd4",
    "perllol.pod": "69e490920e2eda548ef18c45d8301df84c669bd6118642dfaaa260adb8a11cf1",
    "perlmod.pod": "52e86623ddf27de91aa2388e64acc6cfc5cb62bf3592c160e30f5628db824e20",
    "perlmodinstall.pod": "7e3fc8c9d58cce20e66d57392192c6b9bb13728bed81b6a199fb77448ab90aa3",
    "perlmodstyle.pod": "23005b1a7596eda4ec21f9a5864cf58ed1eb6d3224c2fb2ed43277fb737a688f",
    "perlnewmod.pod": "77d5ec61bec8ce7f2445b78c66f7220168f6fbedb559c3b958105b6e714b1c85",
    "perlnumber.pod": "deb1bb10c2a83603be7de475531810a26650b0b0c5946151ae00ba71ee824db8",
    "perlobj.pod": "69d0fd617dc397324a14329da49a1a69184409bc180f9f8155102208e4635768",
    "perlootut.pod": "7ae3cc705ddbe5fec5d24cf15b2066e3f678e02e1afd07f67ab7c69f1f79f0c3",
    "perlop.pod": "cb78c80b03768c0d699487248ad89ff6b06777e18ef7ccc4b3c6504417555ce0",
    "perlopentut.pod": "a2b65f190360581e60e98297427e3d1fd16b91d7bc3db5bb1bc8f1ccbe65b9de",
    "perlpacktut.pod": "5ed64edd4cff2765170b508ff637e2634943120cfb0b855b15da6c60d4a1fdaa",
    "perlperf.pod": "238746611b2ff01389b224a3b5639d6649a641da3304a7bb31b0c5e8e9d1c1d2",
    "perlpod.pod": "90c20a536238d0380f6bd1e6d7d1361f1a6999845e81831ae7bd827c46767862",
    "perlpodstyle.pod": "d5adeda4121253317cd90e27adc9a16f31b48c0f179c47ae2dfda9b465fd2e08",
    "perlpolicy.pod": "10db94ca4440a783c229dbdcc1b88573f740ce36e5918ea303dfa1ce2f89d7b7",
    "perlport.pod": "12bc37d3b711d1a9aee1995d0a253f9b2e3d288bfd519e7af6fd1f631599d849",
    "perlpragma.pod": "c9f7d14fa1a691eec28f34fda0aa5c26746249aa383d0211a5061c63dcfc94c3",
    "perlre.pod": "003dc9dd68057d7312fc457d293cf7e47ad29211115c4bc320227b557bd20dec",
    "perlrebackslash.pod": "ca4621ac1ff14046c61bf6f39b3b21dbb926359cbb708b07d9e4af5cb61716e9",
    "perlrecharclass.pod": "e618b4417d4d831054fd22151f5d4dfebe992fa06db633a6f5faa43251896317",
    "perlref.pod": "1ec11cb99bdb075ab83b58d844ae2fde5e276e6a7d514dccd51b99bc41ea0f3d",
    "perlreftut.pod": "756e5c3cbf6dcda6dbf4acb08a58311e597cfe19a5188937f80fc820b4ca4426",
    "perlrequick.pod": "e8d091d61f97bcae16076f4a8b189decde942638bc9829c6a32084306f6c21e8",
    "perlreref.pod": "23a0c7aa346d8aae7d43c17d2523d27a727feab439a9a838da85a3440504dde5",
    "perlretut.pod": "3820c74ae78df92855ac6f90d250fe8329c45a4b677702514f49e60d0220be9d",
    "perlrun.pod": "ff1915a0a9816e453e2ac99aabaf8a0cdce4e76c2361e7f54ac73ba362e8584b",
    "perlsec.pod": "c2ef23aaa966a73587e3bba08ec9347789ed6f86e665c487412fe30600666abd",
    "perlstyle.pod": "6403e2e0e980a2762a1c5cda0ed6f216e4a26c7fa471b75a43c7507f24f73367",
    "perlsub.pod": "9609087098adaa5a31b524922f210c2b8d7687fc2818e98cfed306656bac03c1",
    "perlsyn.pod": "9f2ccc35a6d1da26876264824d1fea3fb8908d36605f49b941679145b3a4266f",
    "perlthrtut.pod": "fad373b511a695d5ea4868346b8535227b1ccf7760f16e7ef1a90c6602412a68",
    "perltie.pod": "077655c219f3620d11411420068d349624bdcd6a38a8df6eac4c14132a9d89dc",
    "perltrap.pod": "77d92756afbc3865c845c63ac74a4bbf5ee126c21f379c50a8f60d75fb389cfc",
    "perlunicode.pod": "9c1fee020f15c988458acc9ef824785f7344e17f51263fa745d8a61c3c3f425a",
    "perlunicook.pod": "6a9b1ef57c0302fdc9b9893a771ad1a4121532c4727f7ef6e572c341efc4e6d3",
    "perluniintro.pod": "68d6cd59f15c2e6c6dde9d681fee65e4b8a0ee294a39aaabc1f133a91830f4c6",
    "perlunitut.pod": "7c8bc06b5bc5ddc7a010d6fe4d3db0b49fd36e1118bfe8a9c34238ad5981addb",
    "perlvar.pod": "2163ef9af87ee6121260210dba8dfe312f2f503f860cd913ccb15dc68e45d21f",
    "perlxs.pod": "2af54c1b15b26e77cc19ca04494d30a3a44a354d3570619f59dd924e998c914c",
    "perlxstut.pod": "8e7075464016170aecb95b7200fb9098198b624dc24a2086e91e2910bf9ef68b",
}

README = """# Perl FAQ
{queries:,} questions of the Perl FAQ; the passages are its {answers:,} answers among {others:,} sections
of the Perl manual. BEIR layout, only a test split. Passages are long (median {median} words, longest
{longest:,}) and contain code; judgements are graded.

## Sources
Debian's package {package}, folder /usr/share/perl/5.36.0/pod. Copyright 1997-2010 Tom Christiansen, Nathan
Torkington and others (the FAQ), Larry Wall and others (the manual); the same terms as Perl itself: the GNU GPL, version
1 or later, or the Artistic License. LICENSE states this and contains the Artistic License. The files here are modified:
a selection, without formatting, in another format.

## Relevance
- Grade {answer}: the answer below the question, one per question.
- Grade {pointed}: a section of the manual that the answer links to, such as L<perlop/"Floating-point Arithmetic">;
  {pointers} in all. Links to whole pages are not judgements.

Passages have no title. An answer does not include its question; a section of the manual starts with its heading.
Answers that repeat their own question literally: {leaked}.

## Limitations
- Other answers and sections of the manual may answer a question as well. They are unjudged and count as not relevant.
  Scores are lower bounds: use them to compare systems.
- Questions and answers were written by the same people and share words, above all names of functions and modules. This
  favors BM25.
- With {queries} queries, small differences are not significant; `retriever evaluate compare` tests them.
- The text is on the web, so a pretrained model may have seen it.

## Build
    apt-get download perl-doc && dpkg-deb -x perl-doc_*.deb perl-doc     # or install the package
    python scripts/datasets/make_perlfaq.py build --pod perl-doc/usr/share/perl/5.36.0/pod \\
        --out scripts/datasets/data/perlfaq
    python scripts/datasets/make_perlfaq.py unpack --out runs/perlfaq  # uncompressed, for other programs

Pages: the FAQ and {pages} pages of the manual, without change logs, ports to other systems, internals, translations and
licenses. A section extends from one heading to the next; in perlfunc, perlvar and perlglossary the items of the
outermost lists are sections too. Sections of fewer than five words are left out; of equal ones the first is kept. Ids
are the page and the number of the section.

## Checksums
sha256 of the uncompressed files here:

```
{sums}
```

and of the source files:

```
{sources}
```
"""

LICENSE = """The questions and answers are those of perlfaq 5.20210520: Copyright (c) 1997-2010 Tom Christiansen, Nathan
Torkington, and other authors as noted. All rights reserved. The other passages are from the manual of Perl 5.36.0:
Copyright (c) 1987-2022 Larry Wall and others, and the authors named in its pages.

This documentation is free; you can redistribute it and/or modify it under the same terms as Perl itself: either the
GNU General Public License as published by the Free Software Foundation, version 1 or (at your option) any later
version, or the "Artistic License", which follows. Code examples in the FAQ are in the public domain.

The files here are a modified form: a selection of sections, without formatting, in another format
(scripts/datasets/make_perlfaq.py). The unmodified pages are in Debian's package perl-doc and at https://perldoc.perl.org.

"""


def read_pages(folder: Path) -> dict[str, list[Section]]:
    """The sections with text, by page.

    Raises:
        InputError: a page is missing or from another version.
    """
    pages = {}
    for name, sha256 in SOURCES.items():
        path = checked_source(folder, name, sha256, PACKAGE)
        page = path.stem
        found = sections(path.read_text(encoding="utf-8"), items=page in LISTS)
        pages[page] = [section for section in found if len(section.text.split()) >= 5]
    return pages


def is_question(page: str, section: Section) -> bool:
    """Whether a section is a question of the FAQ, that is, a second-level heading."""
    return page in FAQ and section.level == 2


def numbered(pages: dict[str, list[Section]]) -> Iterator[tuple[str, str, Section]]:
    """(id, page, section) of the passages: answers and sections of the manual, without the FAQ's other sections."""
    for page, found in pages.items():
        for number, section in enumerate(found, start=1):
            if page not in FAQ or is_question(page, section):
                yield f"{page}-{number}", page, section


def build_tables(pages: dict[str, list[Section]]) -> dict[str, str]:
    """The BEIR files as text, by name."""
    passages: dict[str, str] = {}
    first_of: dict[str, str] = {}
    named: dict[tuple[str, str], str] = {}
    questions: dict[str, list[tuple[str, Section]]] = {}
    for key, page, section in numbered(pages):
        asked = is_question(page, section)
        text = section.text if asked else "\n\n".join([" / ".join(section.headings), section.text])
        key = first_of.setdefault(text, key)
        passages[key] = text
        for heading in section.headings:
            named.setdefault((page, heading), key)
            # Items of perlfunc include arguments: "open FILEHANDLE,MODE".
            if section.level == 9:
                named.setdefault((page, heading.split()[0]), key)
        if asked:
            questions.setdefault(section.headings[0], []).append((key, section))

    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for question, answers in questions.items():
        query = f"q-{answers[0][0]}"
        queries[query] = question
        pointed = {named[link] for _, section in answers for link in section.links if link in named}
        grades = dict.fromkeys(sorted(pointed), POINTED_AT) | {key: ANSWER for key, _ in answers}
        qrels[query] = grades
    return tables_of(passages, queries, qrels)


def readme_of(tables: dict[str, str]) -> str:
    """The README of the bundled folder, with counts and checksums."""
    passages = {row["_id"]: row["text"] for row in map(json.loads, tables["corpus.jsonl"].splitlines())}
    questions = {row["_id"]: row["text"] for row in map(json.loads, tables["queries.jsonl"].splitlines())}
    judged = [row.split("\t") for row in tables["qrels/test.tsv"].splitlines()[1:]]
    answers = [(query, passage) for query, passage, grade in judged if int(grade) == ANSWER]
    lengths = [len(text.split()) for text in passages.values()]
    return README.format(
        queries=len(questions),
        answers=len({passage for _, passage in answers}),
        others=len(passages) - len({passage for _, passage in answers}),
        median=round(statistics.median(lengths)),
        longest=max(lengths),
        package=PACKAGE,
        answer=ANSWER,
        pointed=POINTED_AT,
        pointers=len(judged) - len(answers),
        leaked=sum(normalized(questions[query]) in normalized(passages[passage]) for query, passage in answers),
        pages=len(SOURCES) - len(FAQ) - 1,
        **checksums(tables, SOURCES),
    )


def license_of(pages: dict[str, list[Section]]) -> str:
    """The terms, and the Artistic License from Perl's own page."""
    artistic = [" / ".join(section.headings) + "\n\n" + section.text for section in pages[LICENSE_PAGE]]
    return LICENSE + "\n\n".join(artistic) + "\n"


def build(pod: Path, out: Path) -> None:
    """Write the bundled folder.

    Raises:
        InputError: a page is missing or from another version, or `out` contains other files.
    """
    pages = read_pages(pod)
    license = license_of(pages)
    tables = build_tables({page: found for page, found in pages.items() if page != LICENSE_PAGE})
    write_bundled(out, tables, license, readme_of(tables))


def normalized(text: str) -> str:
    """Letters and digits in lower case, separated by single spaces."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def main(arguments: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("build", help="make the bundled folder from Perl's pages")
    whole.add_argument(
        "--pod",
        type=Path,
        default=Path("/usr/share/perl/5.36.0/pod"),
        help="folder with Perl 5.36.0's .pod files (default: %(default)s, where Debian's package perl-doc puts them)",
    )
    whole.add_argument("--out", type=Path, default=BUNDLED, help="folder to write (default: %(default)s)")
    part = commands.add_parser("unpack", help="copy the bundled folder uncompressed")
    part.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(arguments)
    if given.command == "build":
        return finish("make_perlfaq", lambda: build(given.pod, given.out), given.out)
    return finish("make_perlfaq", lambda: unpack(BUNDLED, given.out), given.out)


if __name__ == "__main__":
    sys.exit(main())
