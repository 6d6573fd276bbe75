"""Validation of a BEIR folder before an evaluation; reads the files once."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eval.metrics import Qrels
from eval.sets.digests import Sample, digest, repetitions
from eval.sets.plan import BY_NAME
from index.beir import (
    NUMBER,
    PASSAGE,
    PASSAGE_HEADS,
    QUERY,
    Judgements,
    beir_file,
    first_locations,
    head_names,
    is_header,
    judgement_lines,
    parse_query,
    read_qrels,
)
from index.files import InputError
from index.passages import Passage, folded, parse_passage
from index.records import Record, read_records

LOCATIONS_SHOWN = 3
# Passages between two calls of `progress`.
PROGRESS_STEP = 10_000


@dataclass
class Finding:
    """A kind of error or warning, with its count and first locations."""

    what: str
    error: bool
    count: int = 0
    locations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.what}: {self.count:,}; first {'; '.join(self.locations)}"


@dataclass
class Preflight:
    """The contents of a BEIR folder and the findings of its validation."""

    name: str
    split: str
    passages: int = 0
    queries: int = 0
    """Number of judged queries of the split."""
    judgements: int = 0
    bytes: int = 0
    """Bytes of the corpus texts in UTF-8."""
    findings: dict[str, Finding] = field(default_factory=dict)
    query_sample: list[str] = field(default_factory=list)
    passage_sample: list[str] = field(default_factory=list)
    """Samples of up to 4096 queries and passages, chosen by the hash of the id and therefore reproducible."""

    def add(self, what: str, location: str, *, error: bool = False) -> None:
        """Count one occurrence of the finding `what`; the first locations are kept."""
        finding = self.findings.setdefault(what, Finding(what, error))
        finding.count += 1
        if len(finding.locations) < LOCATIONS_SHOWN:
            finding.locations.append(location)

    def add_judged(
        self, what: str, path: Path, column: int, ids: Collection[str], *, wanted: str = "", error: bool = False
    ) -> None:
        """Count the finding `what` for each id in a column of the qrels; `wanted` says what was expected instead."""
        if ids:
            locations = first_locations(path, column, ids, LOCATIONS_SHOWN)
            descriptions = {
                id_: f"expected {wanted}, found {id_}, which is not there" if wanted else id_ for id_ in locations
            }
            self.findings[what] = Finding(
                what, error, len(ids), [f"{locations[id_]}: {descriptions[id_]}" for id_ in locations]
            )

    @property
    def errors(self) -> list[Finding]:
        """Findings that prevent an evaluation."""
        return [finding for finding in self.findings.values() if finding.error]

    @property
    def warnings(self) -> list[Finding]:
        """Findings that affect the interpretation of the metrics."""
        return [finding for finding in self.findings.values() if not finding.error]

    def refuse(self) -> None:
        """Raise an InputError with the first error and the number of the others, if there are errors."""
        if self.errors:
            others = sum(finding.count for finding in self.errors) - 1
            more = f" (and {others:,} more errors in {self.name})" if others else ""
            raise InputError(f"{self.errors[0].locations[0]}{more}")


def preflight(
    folder: Path,
    split: str = "test",
    *,
    name: str | None = None,
    dangling: bool = False,
    keep_identical_ids: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Preflight:
    """Validate a BEIR folder and count errors and warnings. Takes about 100 bytes of memory per passage.

    Errors: missing or broken files, rows without id or text, duplicate ids, two grades for one pair, judged passages
    or queries that do not exist (warnings with `dangling`), wrong headers. Warnings: empty texts, duplicate texts,
    queries without a relevant passage, queries that also occur in another split (by id, or by text ignoring case and
    white space), counts that differ from those BEIR publishes, a first line that the beir package would drop.

    Args:
        folder: the BEIR folder.
        split: the split of the qrels.
        name: the name of the set, for the comparison with BEIR's counts; by default the name of the folder.
        dangling: report judged passages and queries that do not exist as warnings instead of errors.
        keep_identical_ids: passages with the id of their query stay in rankings, so they are not counted.
        progress: called with the number of passages read since the last call.
    """
    result = Preflight(name or folder.resolve().name, split)
    try:
        paths = [beir_file(folder, file) for file in (f"qrels/{split}.tsv", "queries.jsonl", "corpus.jsonl")]
    except InputError as error:
        result.add("missing files", str(error), error=True)
        return result
    qrels = _read_qrels(result, paths[0])
    result.queries, result.judgements = len(qrels), sum(map(len, qrels.values()))
    texts = _read_queries(result, paths[1], qrels, paths[0], dangling)
    _read_corpus(result, paths[2], qrels, paths[0], dangling, keep_identical_ids, progress)
    _compare_splits(result, folder, qrels, texts)
    definition = BY_NAME.get(result.name)
    if definition is not None and definition.split == split and definition.md5:
        for what, ours, theirs in (
            ("passages", result.passages, definition.passages),
            ("judged queries", result.queries, definition.queries),
        ):
            if ours != theirs and not definition.parts:
                result.add(f"other number of {what} than published", f"{folder}: expected {theirs:,}, found {ours:,}")
    return result


def _read_qrels(result: Preflight, path: Path) -> Qrels:
    judgements = Judgements()
    try:
        for line, (_, columns, location) in enumerate(judgement_lines(path)):
            if line == 0 and is_header(columns):
                try:
                    judgements.begin(columns, location)
                except InputError as error:
                    result.add("header mistakes", str(error), error=True)
                continue
            if line == 0 and path.suffix != ".parquet":
                if _is_wrong_header(result, columns, location):
                    continue
                result.add("no header: the beir package would drop the first judgement", location)
            elif is_header(columns) and path.suffix != ".parquet":
                result.add("headers within the file", f"{location}: expected a judgement, found a header", error=True)
                continue
            try:
                judgements.add(columns, location)
            except InputError as error:
                result.add("broken judgements", str(error), error=True)
        judgements.check()
    except InputError as error:
        result.add("files that cannot be read", str(error), error=True)
    if not judgements.qrels:
        result.add("no judgements", f"{path}: expected judgements, found none", error=True)
    without_relevant = {query for query, grades in judgements.qrels.items() if max(grades.values()) < 1}
    result.add_judged("queries without a relevant passage, which count as 0", path, QUERY, without_relevant)
    return judgements.qrels


def _is_wrong_header(result: Preflight, columns: list[str], location: str) -> bool:
    """Whether the first line is a wrong header; if so, add the error."""
    if head_names(columns)[0] in PASSAGE_HEADS:
        what = f"expected the query's id in the first column, found {columns[0]!r:.40}"
        result.add("header mistakes", f"{location}: {what}", error=True)
        return True
    if NUMBER.fullmatch(columns[-1]):
        return False
    what = f"expected a header (query-id, corpus-id, score) or a judgement, found {' '.join(columns)!r:.60}"
    result.add("header mistakes", f"{location}: {what}", error=True)
    return True


def _read_queries(result: Preflight, path: Path, qrels: Qrels, judged_in: Path, dangling: bool) -> dict[str, str]:
    """Read all queries; query id -> text with case and white space normalized."""
    texts: dict[str, str] = {}
    first: dict[str, str] = {}
    sample = Sample()
    for record in _records(result, path):
        try:
            query, text = parse_query(record)
        except InputError as error:
            result.add("broken queries", str(error), error=True)
            continue
        if query in texts:
            what = f"{record.place}: expected each query id once, found {query} again"
            result.add("duplicate query ids", what, error=True)
            continue
        texts[query] = folded(text)
        if query in qrels:
            sample.add(query, text)
            earlier = first.setdefault(texts[query], query)
            if earlier != query:
                result.add("judged queries with the text of another", f"{record.place} (as {earlier})")
    missing = qrels.keys() - texts.keys()
    fatal = not dangling or len(missing) == len(qrels)
    wanted = f"ids of {path.name}"
    result.add_judged("judged queries that are not there", judged_in, QUERY, missing, wanted=wanted, error=fatal)
    if (
        missing
        and len(missing) == len(qrels)
        and any(passage in texts for grades in qrels.values() for passage in grades)
    ):
        what = f"{judged_in}: expected query, then passage, found passages in the first column"
        result.add("columns in the wrong order", what, error=True)
    result.query_sample = sample.texts()
    return texts


def _read_corpus(
    result: Preflight,
    path: Path,
    qrels: Qrels,
    judged_in: Path,
    dangling: bool,
    keep_identical_ids: bool,
    progress: Callable[[int], None] | None,
) -> None:
    judged = {passage: False for grades in qrels.values() for passage in grades}
    identical = 0
    ids, texts, numbers = bytearray(), bytearray(), array("q")
    sample = Sample()
    for number, record in enumerate(_records(result, path)):
        if progress is not None and number % PROGRESS_STEP == PROGRESS_STEP - 1:
            progress(PROGRESS_STEP)
        try:
            passage = parse_passage(record)
        except InputError as error:
            result.add("broken passages", str(error), error=True)
            continue
        result.passages += 1
        identical += passage.id in qrels and passage.id not in qrels[passage.id]
        if passage.id in judged:
            judged[passage.id] = True
        content = passage.content
        result.bytes += len(content.encode(errors="replace"))
        ids += digest(passage.id)
        # Empty texts have a finding of their own and are not duplicates of each other.
        texts += digest(content or f"\0{number}")
        numbers.append(number)
        if content:
            sample.add(passage.id, content)
        else:
            result.add("passages without any text", f"{record.place} ({passage.id})")
    if not result.passages and not result.errors:
        result.add("no passages", f"{path}: expected passages, found none", error=True)
    result.passage_sample = sample.texts()
    _add_duplicates(result, path, ids, texts, numbers)
    missing = {passage_id for passage_id, exists in judged.items() if not exists}
    wanted = "passage ids of the corpus"
    result.add_judged(
        "judged passages that are not there", judged_in, PASSAGE, missing, wanted=wanted, error=not dangling
    )
    if identical and not keep_identical_ids:
        what = "queries with the id of a passage that is not judged for them, which is left out of their ranking"
        result.add(what, f"{identical:,} of {len(qrels):,}; --keep-identical-ids keeps them")
        result.findings[what].count = identical


def _add_duplicates(result: Preflight, path: Path, ids: bytearray, texts: bytearray, numbers: array) -> None:
    """Add findings for duplicate ids and texts; reads the corpus again, for line numbers, only if there are any."""
    same_id, same_text = repetitions(ids), repetitions(texts)
    same_text = {later: earlier for later, earlier in same_text.items() if later not in same_id}
    if not same_id and not same_text:
        return
    wanted: dict[int, str] = {}
    for repeated in (same_id, same_text):
        for later in sorted(repeated)[:LOCATIONS_SHOWN]:
            wanted |= {numbers[later]: "", numbers[repeated[later]]: ""}
    named: dict[int, Passage] = {}
    for number, record in enumerate(read_records(path)):
        if number in wanted:
            wanted[number], named[number] = record.place, parse_passage(record)
            if len(named) == len(wanted):
                break
    for repeated, what, error in (
        (same_id, "duplicate passage ids", True),
        (same_text, "passages with the text of an earlier one", False),
    ):
        for later in sorted(repeated)[:LOCATIONS_SHOWN]:
            location, earlier = wanted[numbers[later]], wanted[numbers[repeated[later]]]
            id_ = named[numbers[later]].id
            description = (
                f"expected each passage id once, found {id_} again, first in {earlier}" if error else f"as {earlier}"
            )
            result.add(what, f"{location}: {description}", error=error)
        if repeated:
            result.findings[what].count = len(repeated)


def _compare_splits(result: Preflight, folder: Path, qrels: Qrels, texts: dict[str, str]) -> None:
    """Add warnings for queries that also occur in another split, since the model may have been trained on them."""
    ours = {texts[query] for query in qrels if query in texts}
    for other in ("train", "dev", "validation", "test"):
        path = folder / "qrels" / f"{other}.tsv"
        path = path if path.is_file() else path.with_name(f"{other}.tsv.gz")
        if other == result.split or not path.is_file():
            continue
        try:
            theirs = [query for query in read_qrels(path) if query in texts]
        except InputError as error:
            result.add(f"qrels of {other} that cannot be read, and are not compared", str(error))
            continue
        too = [query for query in theirs if query in qrels]
        alike = [query for query in theirs if query not in qrels and texts[query] in ours]
        result.add_judged(f"queries judged in {other} too", path, QUERY, too)
        result.add_judged(f"queries with the text of one in {other}", path, QUERY, alike)


def _records(result: Preflight, path: Path) -> Iterator[Record]:
    """Yield the rows of a file up to the first unreadable one, which is added as an error."""
    try:
        yield from read_records(path)
    except InputError as error:
        result.add("files that cannot be read", str(error), error=True)
