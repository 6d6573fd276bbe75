"""A corpus whose passages can be read in any order, and from which a step draws passages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from index.beir import beir_file
from index.files import InputError, atomic_path, read_json, sha256_file, write_json
from index.passages import PassageFile, file_state

VERSION = 1
BATCH_ROWS = 4096
# Second word of the seed; see data/schedules/ and data/batches.py for the others.
_RANDOM_PASSAGES = 4


class CorpusTable:
    """The passages of a corpus in a memory-mapped Arrow file. Picklable.

    Attributes:
        path: The Arrow file.
        name: Path of the corpus.
        sha256: Checksum of the converted passages.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow

        self.path = path
        metadata = read_json(path.with_suffix(".json"))
        self.name, self.sha256 = str(metadata["name"]), str(metadata["sha256"])
        try:
            self._content = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all().column("content")
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{path}: cannot be read (remove it to convert {self.name} again): {error}") from None

    def __len__(self) -> int:
        return len(self._content)

    def __getitem__(self, row: int) -> str:
        """Return the text of a passage, title included."""
        return str(self._content[int(row)].as_py())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BATCH_ROWS):
            yield from self._content.slice(start, BATCH_ROWS).to_pylist()

    def __reduce__(self) -> tuple[type[CorpusTable], tuple[Path]]:
        return CorpusTable, (self.path,)

    def draw(self, seed: int, step: int, count: int) -> np.ndarray:
        """Return `count` different random rows, int64; a function of the seed and the step."""
        generator = np.random.default_rng([seed, _RANDOM_PASSAGES, step])
        return generator.choice(len(self), count, replace=False, shuffle=False).astype(np.int64)


def open_corpus(corpus: str, cache: Path, *, progress: Callable[[int], None] | None = None) -> CorpusTable:
    """Open a corpus; convert it first unless the result is in the folder `cache`. Passages without text are left out.

    Args:
        corpus: A BEIR folder, or a file of passages.
        cache: Folder of converted files.
        progress: Called with the number of passages converted since the last call.

    Raises:
        InputError: The file is missing, invalid or empty.
    """
    import pyarrow

    source = Path(corpus)
    file = beir_file(source, "corpus.jsonl") if source.is_dir() else source
    if not file.exists():
        raise InputError(f"{corpus}: no such file or folder")
    state = file_state(file)
    identity = json.dumps([VERSION, str(file.resolve()), state])
    path = cache / f"corpus-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.arrow"
    # The JSON file is written last.
    if not (path.exists() and path.with_suffix(".json").exists()):
        cache.mkdir(parents=True, exist_ok=True)
        schema = pyarrow.schema([("content", pyarrow.string())])
        rows = 0
        with atomic_path(path) as temporary:
            with pyarrow.OSFile(str(temporary), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as writer:
                for batch in _batches(file):
                    writer.write_batch(pyarrow.record_batch([pyarrow.array(batch, pyarrow.string())], schema=schema))
                    rows += len(batch)
                    if progress is not None:
                        progress(len(batch))
            if not rows:
                raise InputError(f"{file}: expected passages, found none")
            if file_state(file) != state:
                raise InputError(f"{file}: changed while it was read")
            checksum = sha256_file(temporary)
        write_json(path.with_suffix(".json"), {"name": str(file), "sha256": checksum})
    return CorpusTable(path)


def _batches(file: Path) -> Iterator[list[str]]:
    batch: list[str] = []
    for passage in PassageFile(file):
        if passage.content:
            batch.append(passage.content)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
