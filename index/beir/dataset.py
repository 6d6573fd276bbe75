"""BEIR folders: corpus.jsonl, queries.jsonl and qrels/{split}.tsv, plain or .gz, and their Parquet form on the Hub."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from index.beir.qrels import PASSAGE, QUERY, Qrels, first_locations, read_qrels
from index.files import InputError
from index.passages import Passage, checked_query_id, read_passages
from index.records import Record, read_records


def beir_file(folder: Path, name: str) -> Path:
    """The file `name` of a BEIR folder: `name`, `name`.gz, or its Parquet file.

    Parquet datasets on the Hugging Face Hub, such as NanoBEIR, have one folder each for corpus, queries and qrels,
    with one Parquet file. If the folder of qrels has several files, the split selects one by file name; a single file
    is used whatever its name is.

    Raises:
        InputError: no such file exists, or more than one.
    """
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    part, _, split = name.partition("/")
    table = folder / f"{part.removesuffix('.jsonl')}.parquet"
    if not split and table.is_file():
        return table
    files = sorted((folder / part.removesuffix(".jsonl")).glob("*.parquet"))
    if len(files) > 1 and split:
        wanted = split.removesuffix(".tsv")
        files = [path for path in files if path.stem == wanted or path.name.startswith(f"{wanted}-")]
    if len(files) > 1:
        raise InputError(f"{files[0].parent}: expected one Parquet file, found {len(files)}; write them as one {name}")
    if not files:
        raise InputError(f"{folder}: expected {name} or {name}.gz, found neither")
    return files[0]


def is_beir_folder(path: Path) -> bool:
    """Whether `path` is a folder with a corpus and queries."""
    try:
        return path.is_dir() and bool(beir_file(path, "corpus.jsonl") and beir_file(path, "queries.jsonl"))
    except InputError:
        # A folder with several Parquet files counts too: the error is reported when it is opened.
        return any((path / "corpus").glob("*.parquet"))


@dataclass(frozen=True)
class BeirDataset:
    """One split of a BEIR folder: its judged queries in memory, its corpus as a stream."""

    name: str
    folder: Path
    split: str
    queries: dict[str, str]
    """Query id -> text of the judged queries of the split, in the order of the qrels."""
    qrels: Qrels
    dangling: bool = False
    """Whether qrels may judge passages and queries that do not exist. Such passages are never retrieved, and such
    queries count as 0, as in trec_eval.
    """

    @classmethod
    def open(cls, folder: Path | str, split: str = "test", *, dangling: bool = False) -> BeirDataset:
        """Read the queries and qrels of a split.

        Args:
            folder: the BEIR folder.
            split: name of the qrels file, without suffix.
            dangling: accept qrels of queries and passages that do not exist.

        Raises:
            InputError: a file is missing or malformed, the qrels are empty, or, unless `dangling`, a judged query has
                no text.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
        qrels_path = beir_file(folder, f"qrels/{split}.tsv")
        qrels = read_qrels(qrels_path)
        if not qrels:
            raise InputError(f"{qrels_path}: expected judgements, found none")
        queries_path = beir_file(folder, "queries.jsonl")
        queries = read_queries(queries_path)
        missing = qrels.keys() - queries.keys()
        if missing and (not dangling or len(missing) == len(qrels)):
            raise _missing_ids_error(qrels_path, QUERY, missing, f"ids of {queries_path.name}")
        judged = {query: queries[query] for query in qrels if query in queries}
        return cls(folder.resolve().name, folder, split, judged, qrels, dangling)

    @property
    def corpus_file(self) -> Path:
        """Path of corpus.jsonl, corpus.jsonl.gz or its Parquet file."""
        return beir_file(self.folder, "corpus.jsonl")

    @property
    def qrels_file(self) -> Path:
        """Path of qrels/{split}.tsv, its .gz or its Parquet file."""
        return beir_file(self.folder, f"qrels/{self.split}.tsv")

    def passages(self) -> Iterator[Passage]:
        """Stream the corpus."""
        return read_passages(self.corpus_file)

    @property
    def judged(self) -> set[str]:
        """Ids of all passages that the split judges."""
        return {passage for grades in self.qrels.values() for passage in grades}

    def check(self, corpus_ids: Iterable[str]) -> None:
        """Check that the corpus contains every judged passage, unless `dangling`.

        Raises:
            InputError: passages are missing; the message names the first, its line, and how many there are.
        """
        known = corpus_ids if isinstance(corpus_ids, set | frozenset | dict) else set(corpus_ids)
        missing = {passage for passage in self.judged if passage not in known}
        if missing and not self.dangling:
            raise _missing_ids_error(self.qrels_file, PASSAGE, missing, "passage ids of the corpus")


def _missing_ids_error(path: Path, column: int, missing: Collection[str], wanted: str) -> InputError:
    # Qrels that were created in memory may differ from those of the file.
    id_, place = next(iter(first_locations(path, column, missing, most=1).items()), (min(missing), str(path)))
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return InputError(f"{place}: expected {wanted}, found {id_}, which is not there{more}")


def read_queries(path: Path) -> dict[str, str]:
    """Read queries (id -> text) from a file with columns `_id` (or `id`) and `text`.

    The file may be .jsonl, .jsonl.gz, .csv, .tsv or .parquet.

    Raises:
        InputError: the file is missing or malformed, an id occurs twice, or a query has no text; the message names the
            line.
    """
    queries: dict[str, str] = {}
    for record in read_records(path):
        query, text = parse_query(record)
        if query in queries:
            raise InputError(f"{record.place}: expected each query id once, found {query} again")
        queries[query] = text
    return queries


def parse_query(record: Record) -> tuple[str, str]:
    """Id and text of a row.

    Raises:
        InputError: a column is missing, the id is invalid, or the text is empty.
    """
    fields = record.fields
    key = "_id" if "_id" in fields else "id"
    for column in (key, "text"):
        if column not in fields:
            wanted = "'_id' or 'id'" if column == key else "'text'"
            raise InputError(f"{record.place}: expected a column {wanted}, found {', '.join(fields) or 'none'}")
    query, text = checked_query_id(fields[key], record.place), fields["text"]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{record.place}: expected text for query {query}, found {text!r:.60}")
    return query, text
