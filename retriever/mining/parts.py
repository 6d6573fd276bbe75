"""Writing rows in parts, so that an interrupted command continues and several processes share the work."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index.files import InputError, atomic_path, read_json, sha256_file, write_json
from index.progress import Reporter
from retriever.config.sources import SourceConfig
from retriever.data.sources import Example
from retriever.distributed.ranks import Ranks

PART_ROWS = 2**16
MIN_PART_ROWS = 2**10
MARKER = "work.json"


@dataclass(frozen=True)
class Part:
    """Rows of a part as lines of JSON, and counts that are added up over all parts."""

    lines: list[str]
    counts: Mapping[str, int]


def example_line(example: Example, source: SourceConfig) -> str:
    """Return a row as a line of JSON that is a training source with the default columns.

    Prompts of the row have the columns that the source has them in.
    """
    fields: dict[str, Any] = {
        "query": example.query,
        "positive": list(example.positives),
        "negatives": list(example.negatives),
    }
    if example.scores is not None:
        fields["scores"] = list(example.scores)
    for column, prompt in (
        (source.query_prompt_column, example.query_prompt),
        (source.passage_prompt_column, example.passage_prompt),
    ):
        if column is not None:
            fields[column] = prompt
    return json.dumps(fields, ensure_ascii=False)


class Workplace:
    """The folder OUT.work beside the file to write. It is removed when the file is complete.

    Args:
        out: The file to write.
        ranks: All ranks.

    Raises:
        InputError: The folder exists and was not made by this class.
    """

    def __init__(self, out: Path, ranks: Ranks) -> None:
        self.out, self.ranks = out, ranks
        self.folder = out.with_name(f"{out.name}.work")
        with ranks.first_rank_first():
            if self.folder.exists() and not (self.folder / MARKER).exists():
                raise InputError(f"{self.folder}: expected no such folder, or that of an interrupted command")
            if ranks.is_first and not self.folder.exists():
                self.folder.mkdir(parents=True)
                write_json(self.folder / MARKER, {"out": out.name})

    @contextlib.contextmanager
    def removed_if_unused(self) -> Iterator[None]:
        """Context that removes the folder if the body fails before anything was made that a repetition would use."""
        try:
            yield
        except BaseException:
            used = (self.folder / "embeddings").exists() or any(self.folder.glob("parts-*/*.jsonl"))
            if self.ranks.is_first and not used:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def write(
        self,
        rows: int,
        identity: Mapping[str, Any],
        make: Callable[[int, int], Part],
        reporter: Reporter,
        *,
        part_rows: int = PART_ROWS,
    ) -> Counter[str]:
        """Write the file from the parts that the ranks make, in the order of the rows, and remove the folder.

        Args:
            rows: Number of rows of the source.
            identity: Everything that the result depends on, as JSON values. Parts with another identity are not used.
            make: Called with the first and the last row (exclusive) of a part.
            reporter: Receives messages.
            part_rows: Largest number of rows of a part, which `make` holds in memory. Default: 65,536.

        Returns:
            The sums of the counts of all parts.

        Raises:
            InputError: A part is damaged.
        """
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        folder = self.folder / f"parts-{key}"
        size = self._part_rows(folder, rows, part_rows)
        starts = range(0, rows, size)
        done = {number for number in range(len(starts)) if _path(folder, number, "json").exists()}
        if done and self.ranks.is_first:
            reporter.line(f"{folder}: continuing after {len(done)} of {len(starts)} parts")
        self.ranks.barrier()
        for number in range(self.ranks.rank, len(starts), self.ranks.world_size):
            if number in done:
                continue
            stop = min(rows, starts[number] + size)
            if len(starts) > 1:
                reporter.line(f"rows {starts[number] + 1:,} to {stop:,} of {rows:,}")
            part = make(starts[number], stop)
            path = _path(folder, number, "jsonl")
            with atomic_path(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in part.lines), encoding="utf-8")
            # Written last: if it exists, the part is complete.
            write_json(_path(folder, number, "json"), {"sha256": sha256_file(path), "counts": dict(part.counts)})
        self.ranks.barrier()
        counts: Counter[str] = Counter()
        for number in range(len(starts)):
            counts.update(read_json(_path(folder, number, "json"))["counts"])
        self.ranks.barrier()
        if self.ranks.is_first:
            self._join(folder, len(starts))
        self.ranks.barrier()
        return counts

    def _part_rows(self, folder: Path, rows: int, most: int) -> int:
        """Rows per part: those of an earlier command, otherwise a few parts for each rank."""
        with self.ranks.first_rank_first():
            path = folder / "parts.json"
            if self.ranks.is_first and not path.exists():
                folder.mkdir(exist_ok=True)
                share = -(-rows // (4 * self.ranks.world_size))
                write_json(path, {"rows": max(MIN_PART_ROWS, min(most, share))})
            return int(read_json(path)["rows"])

    def _join(self, folder: Path, parts: int) -> None:
        with atomic_path(self.out) as temporary, temporary.open("wb") as stream:
            for number in range(parts):
                path = _path(folder, number, "jsonl")
                if sha256_file(path) != read_json(_path(folder, number, "json"))["sha256"]:
                    raise InputError(f"{path}: damaged, its checksum differs: remove {folder} and repeat the command")
                with path.open("rb") as part:
                    shutil.copyfileobj(part, stream)
        shutil.rmtree(self.folder)


def _path(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"{number:05d}.{suffix}"
