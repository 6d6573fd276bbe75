"""Damaged files: commands that compute results refuse them; a search reports them in one line and never crashes."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from index_helpers import MODEL, listing, passages_of

from index.ann import index as index_module
from index.ann.build import Plan, build
from index.ann.edit import add_passages, delete_passages, retune
from index.ann.index import Index
from index.ann.merge import merge
from index.ann.multi_index import open_all
from index.ann.settings import core
from index.ann.structure import list_table
from index.ann.train import empty_trained_index
from index.ann.tuning.recall import Target
from index.files import InputError
from index.manifest import INDEX, Manifest, entries, read_manifest, write_manifest
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from index.verify import verify

ROOT = Path(__file__).resolve().parents[2]
FACTORIES = ["Flat", "SQ8", "PQ4x4fs", "IVF8,Flat", "IVF8_HNSW8,SQ8", "IVF8,PQ4x4fs,RFlat", "HNSW8", "IVF8,SQ8,RFlat"]


def vectors_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 16)).astype(np.float32)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one change: a flipped bit, an overwritten range, a truncation or an extension; half of the changes
    are near the beginning.
    """
    while True:
        found = bytearray(data)
        place = int(rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 400)))
        match rng.integers(4):
            case 0:
                found[place] ^= 1 << int(rng.integers(8))
            case 1:
                piece = slice(place, place + int(rng.integers(1, 64)))
                found[piece] = rng.bytes(len(found[piece]))
            case 2:
                del found[place:]
            case 3:
                found += rng.bytes(int(rng.integers(1, 9)))
        if found != data:
            return bytes(found)


def damages(folder: Path, rng: np.random.Generator, each: int) -> Iterator[str]:
    """Damage every file of `folder` several times, one file at a time; yield its name."""
    for name, data in listing(folder).items():
        for _ in range(each):
            # A new file: an index may still map the old one, which must not be truncated.
            (folder / name).unlink()
            (folder / name).write_bytes(damaged(data, rng))
            yield name
        (folder / name).write_bytes(data)


def refuses(run: Callable[[], object], folder: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        run()
    message = str(caught.value)
    assert message.startswith(f"{folder / name}: ") and "\n" not in message


def forge(folder: Path, name: str, data: bytes) -> None:
    """Write other bytes to a file and update the checksums in the manifest."""
    (folder / name).write_bytes(data)
    old = read_manifest(folder)
    write_manifest(Manifest(folder, old.format, old.fields, entries(folder, list(old.files))))


@pytest.mark.parametrize("factory", ["Flat", "IVF8,SQ8"])
def test_every_command_refuses_damaged_files_by_name(
    tmp_path: Path, make_store: Callable, rng: np.random.Generator, factory: str
) -> None:
    store = make_store(vectors_of(120), shard_rows=60)
    more = make_store(vectors_of(50, seed=1), [f"m{row}" for row in range(50)], name="more", shard_rows=50)
    build(store, tmp_path / "index", Plan(factory))
    build(more, tmp_path / "other", Plan(train_from=tmp_path / "index"))
    out, index = tmp_path / "out", tmp_path / "index"

    def stored() -> EmbeddingStore:
        return EmbeddingStore.open(store.folder)

    of_store: list[Callable[[], object]] = [
        lambda: build(stored(), out, Plan(factory)),
        lambda: build(stored(), out, Plan(factory, target=Target(0.5, held_out=30))),
        lambda: build(stored(), out, Plan(train_from=tmp_path / "other")),
        lambda: add_passages(tmp_path / "other", stored(), out),
        lambda: retune(index, stored(), Target(0.5, held_out=30)),
        lambda: EmbeddingWriter(store.folder, dim=16, model=MODEL, source=store.source, shard_rows=60),
        lambda: verify(store.folder),
    ]
    of_index: list[Callable[[], object]] = [
        lambda: merge([index, tmp_path / "other"], out),
        lambda: merge([tmp_path / "other", index], out),
        lambda: add_passages(index, more, out),
        lambda: delete_passages(index, ["d1"], out),
        lambda: retune(index, store, Target(0.5, held_out=30)),
        lambda: Index.open(index, verify="hash"),
        lambda: open_all([index], verify="hash", mmap=True),
    ]
    for folder, runs, each in ((store.folder, of_store, 2), (index, of_index, 4)):
        before = listing(folder)
        for name in damages(folder, rng, each):
            for run in runs:
                refuses(run, folder, name)
        assert listing(folder) == before and not out.exists()
    # With --train-from only the faiss file of that index is read.
    for name in damages(index, rng, 4):
        if name in ("index.faiss", "manifest.json"):
            refuses(lambda: build(more, out, Plan(train_from=index)), index, name)
    assert not out.exists()


@pytest.mark.parametrize("factory", ["PQ4x4fs", "IVF8,Flat", "OPQ4,IVF8,PQ4x4fs,RFlat", "PCA8,SQ8"])
def test_training_must_match_its_hash_in_the_manifest(tmp_path: Path, make_store: Callable, factory: str) -> None:
    """Checksums computed after the damage match it; the hash of the training, which is copied, does not."""
    store = make_store(vectors_of(300), shard_rows=100)
    build(store, tmp_path / "a", Plan(factory, part=(1, 3)))
    build(store, tmp_path / "b", Plan(train_from=tmp_path / "a", part=(2, 3)))
    data = bytearray((tmp_path / "a" / "index.faiss").read_bytes())
    empty = bytes(faiss.serialize_index(empty_trained_index(Index.open(tmp_path / "a"))))
    # Flip the last bit of a trained number: in the longest common block of the empty and the filled index.
    place = next(at for at in range(len(empty) // 2, len(empty)) if empty[at : at + 8] == data[at : at + 8] != bytes(8))
    data[place] ^= 1
    forge(tmp_path / "a", "index.faiss", bytes(data))
    verify(tmp_path / "a")
    for run in (
        lambda: build(store, tmp_path / "c", Plan(train_from=tmp_path / "a", part=(3, 3))),
        lambda: merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c"),
        lambda: merge([tmp_path / "b", tmp_path / "a"], tmp_path / "c"),
    ):
        with pytest.raises(InputError, match=r"a/index\.faiss: expected the training of sha256 .* its manifest states"):
            run()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("factory", [*FACTORIES, "NSG8", "IVF8,RQ4x4", "RaBitQ", "PCA8,IVF8,Flat", "IVF8,Flat on disk"])
def test_an_empty_trained_index_matches_its_training_hash(tmp_path: Path, make_store: Callable, factory: str) -> None:
    store = make_store(vectors_of(600), shard_rows=600)
    name, _, on_disk = factory.partition(" ")
    build(store, tmp_path / "index", Plan(name, on_disk=bool(on_disk)))
    assert empty_trained_index(Index.open(tmp_path / "index")).ntotal == 0


# A child process searches every damaged version of an index; if it crashes, its last line is missing.
SEARCH = """
import sys
from pathlib import Path
import numpy as np
from index.files import InputError
from index.ann.index import Index
from test_damage import damages, vectors_of
queries = vectors_of(5, seed=9)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    for mmap in (False, True):
        rng, refused, answered = np.random.default_rng(7 + mmap), 0, 0
        print(folder.name, mmap, end=" ", flush=True)
        for name in damages(folder, rng, 8):
            try:
                index = Index.open(folder, mmap=mmap)
                scores, rows = index.search_rows(queries, 10)
                for row in rows[rows >= 0].tolist():
                    index.passage(row)
                index.search(queries, 3)
                assert np.isfinite(scores[rows >= 0]).all()
                answered += 1
            except InputError as error:
                assert str(folder) in str(error) and chr(10) not in str(error), error
                refused += 1
        print(refused, answered, flush=True)
"""


def test_damaged_indexes_never_crash_a_search(tmp_path: Path, make_store: Callable) -> None:
    store = make_store(vectors_of(200), shard_rows=200)
    for number, factory in enumerate(FACTORIES):
        build(store, tmp_path / "indexes" / str(number), Plan(factory))
    build(store, tmp_path / "indexes" / "on-disk", Plan("IVF8,SQ8", on_disk=True))
    run = subprocess.run(
        [sys.executable, "-c", SEARCH, str(tmp_path / "indexes")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = [line.split() for line in run.stdout.splitlines() if not line.startswith("Ondisk")]
    assert run.returncode == 0 and len(lines) == 2 * (len(FACTORIES) + 1), run.stdout + run.stderr[-2000:]
    for *_, refused, answered in lines:
        assert int(refused) > 25 and int(refused) + int(answered) in (40, 48)


def test_lists_outside_their_file_are_refused(
    tmp_path: Path, make_store: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "index"
    build(make_store(vectors_of(200), shard_rows=200), folder, Plan("IVF4,SQ8", on_disk=True))
    monkeypatch.setattr(index_module, "HASHED_MMAP_BYTES", 0)
    data = (folder / "index.faiss").read_bytes()
    index = Index.open(folder, mmap=True)
    table = list_table(faiss.downcast_InvertedLists(core(index.faiss).invlists))
    for field, value in ((0, 2**20), (1, 2**61), (2, 2**40), (2, 2**64 - 8), (0, 0)):
        changed = table.copy()
        changed[2, field] = value
        if field == 0 and value:
            changed[2, 1] = value
        assert data.count(table.tobytes()) == 1
        (folder / "index.faiss").write_bytes(data.replace(table.tobytes(), changed.tobytes()))
        for mmap in (True, False):
            with pytest.raises(InputError, match=r"index\.faiss: (damaged|cannot be read by faiss)"):
                Index.open(folder, mmap=mmap)
    (folder / "index.faiss").write_bytes(data)
    (folder / "lists.ivfdata").write_bytes((folder / "lists.ivfdata").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"lists\.ivfdata: damaged: expected \d+ bytes"):
        Index.open(folder, mmap=True)


@pytest.mark.parametrize("factory", ["IVF4,SQ8", "IVF4,SQ8,RFlat"])
@pytest.mark.parametrize("row", [200, 2**31, -5, 2**62])
def test_invalid_rows_in_lists_on_disk_are_refused(
    tmp_path: Path, make_store: Callable, monkeypatch: pytest.MonkeyPatch, factory: str, row: int
) -> None:
    monkeypatch.setattr(index_module, "HASHED_MMAP_BYTES", 0)
    refines = factory.endswith("RFlat")
    store, folder = make_store(vectors_of(200), shard_rows=200), tmp_path / "index"
    build(store, folder, Plan(factory, on_disk=not refines))
    path = folder / ("index.faiss" if refines else "lists.ivfdata")
    data = path.read_bytes()
    # Position of row 150 in its list.
    (place,) = [at for at in range(len(data) - 7) if data[at : at + 8] == np.int64(150).tobytes()]
    path.write_bytes(data[:place] + np.int64(row).tobytes() + data[place + 8 :])
    with pytest.raises(InputError, match=rf"{path.name}: damaged: expected rows from 0 to 199"):
        Index.open(folder, mmap=True).search_rows(vectors_of(200), 10)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("value", [b"\0", b"\xff", None])
def test_lists_on_disk_that_can_be_read_quickly_are_checked_before_a_search(
    tmp_path: Path, make_store: Callable, mmap: bool, value: bytes | None
) -> None:
    folder = tmp_path / "index"
    build(make_store(vectors_of(200), shard_rows=200), folder, Plan("IVF4,SQ8", on_disk=True))
    assert Index.open(folder, mmap=mmap).search_rows(vectors_of(1), 10)[1][0, 0] == 0
    data = bytearray((folder / "lists.ivfdata").read_bytes())
    # Rows of -1 alone, with which nothing is found; of 0 alone; and one bit of a vector.
    data[:] = bytes([data[0] ^ 1]) + data[1:] if value is None else value * len(data)
    (folder / "lists.ivfdata").write_bytes(data)
    with pytest.raises(InputError, match=r"lists\.ivfdata: damaged: expected sha256"):
        Index.open(folder, mmap=mmap)


def test_an_index_lets_go_of_its_lists_with_its_last_reference(tmp_path: Path, make_store: Callable) -> None:
    """Threads of faiss read lists ahead, and reading a mapped file that was cut meanwhile ends the process."""
    build(make_store(vectors_of(200), shard_rows=200), tmp_path / "index", Plan("IVF4,SQ8", on_disk=True))
    gc.collect()
    gc.disable()
    try:
        index = Index.open(tmp_path / "index")
        index.search_rows(vectors_of(1), 10)
        kept = weakref.ref(index)
        del index
        assert kept() is None
    finally:
        gc.enable()


def test_a_search_names_the_damaged_file(tmp_path: Path, make_store: Callable) -> None:
    build(make_store(vectors_of(20), shard_rows=20), tmp_path / "index")
    folder = tmp_path / "index"
    whole = Index.open(folder).passage(3)
    assert whole == passages_of(["d3"])[0]
    offsets = np.load(folder / "passages.offsets.npy")
    header = (folder / "passages.offsets.npy").read_bytes()[:128]
    ids, lines = (folder / "ids.txt").read_bytes(), (folder / "passages.jsonl").read_bytes()

    def changed_offsets(value: int) -> bytes:
        changed = offsets.copy()
        changed[3] = value
        return header + changed.tobytes()

    cases = [
        ("passages.offsets.npy", changed_offsets(2**63 + 5), r"passages\.offsets\.npy: damaged: .* line 4"),
        ("passages.offsets.npy", changed_offsets(len(lines)), r"passages\.offsets\.npy: damaged"),
        ("passages.offsets.npy", changed_offsets(int(offsets[3]) + 1), r"passages\.offsets\.npy: damaged"),
        ("passages.offsets.npy", changed_offsets(int(offsets[4])), r"one id for row 3, found 'd4' in passages\.jsonl"),
        ("ids.txt", ids.replace(b"d3\n", b"d\xff\n"), r"ids\.txt: expected UTF-8"),
        ("ids.txt", ids.replace(b"d3\n", b"\n3\n"), r"ids\.txt: expected 20 ids, one per line, found 21"),
        ("ids.txt", ids.replace(b"d3\n", b"d7\n"), r"one id for row 3, found 'd3' in passages\.jsonl and 'd7' in ids"),
        ("passages.jsonl", lines.replace(b"text of d3", b"text of \xff3"), r"passages\.jsonl:4: expected UTF-8"),
        ("passages.jsonl", lines.replace(b'"d3", "title"', b'"d3"  "title"'), r"passages\.jsonl:4: expected JSON"),
    ]
    before = {"ids.txt": ids, "passages.jsonl": lines, "passages.offsets.npy": header + offsets.tobytes()}
    for name, data, message in cases:
        assert data != before[name]
        (folder / name).write_bytes(data)
        if len(data) == len(before[name]):
            # Ids are read when the index is opened, passages when they are wanted.
            with pytest.raises(InputError, match=message):
                Index.open(folder).passage(3)
        else:
            with pytest.raises(InputError, match=rf"{name}: damaged: expected \d+ bytes"):
                Index.open(folder)
        (folder / name).write_bytes(before[name])
    assert Index.open(folder).passage(3) == whole


def test_damaged_npy_headers_are_refused(tmp_path: Path, make_store: Callable, rng) -> None:
    """For any damaged header, the result is the array of the manifest or an error."""
    store = make_store(vectors_of(10), shard_rows=10)
    path = store.folder / "00000.npy"
    data = path.read_bytes()
    expected, refused = store.vectors(), 0
    forged = [data[:128].replace(b"False", b"True ") + data[128:], b"PK\x03\x04" + data[4:]]
    for text in (b"'descr': '|O8'", b"'descr': [[[[", b"'descr': {[]:1}", b"'descr': '<f4'\\"):
        forged.append(data[:11] + text + data[11 + len(text) :])
    for changed in (*forged, *(damaged(data[:128], rng)[:128].ljust(128) + data[128:] for _ in range(200))):
        path.write_bytes(changed)
        try:
            np.testing.assert_array_equal(EmbeddingStore.open(store.folder).vectors(), expected)
        except InputError as error:
            assert str(error).startswith(f"{path}: expected") and "\n" not in str(error)
            refused += 1
    assert refused > 100


def test_verified_files_are_not_read_again(
    tmp_path: Path, make_store: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(vectors_of(40), shard_rows=20)
    build(store, tmp_path / "index")
    counted: list[int] = []
    store.check(counted.append)
    sizes = {path.name: path.stat().st_size for path in store.folder.iterdir()}
    assert sum(counted) == sum(sizes.values()) - sizes["manifest.json"]
    store.check(counted.append)
    assert len(counted) == 6
    index = Index(read_manifest(tmp_path / "index", INDEX))
    read: list[int] = []
    index.check(read.append, ["index.faiss"])
    index.check(read.append)
    index.check(read.append)
    index.open_files()
    assert sum(read) == index.manifest.size and len(read) == len(index.manifest.files)


def test_changed_files_are_verified_again(tmp_path: Path, make_store: Callable) -> None:
    build(make_store(vectors_of(40), shard_rows=20), tmp_path / "index")
    index = Index(read_manifest(tmp_path / "index", INDEX))
    index.check()
    build(make_store(vectors_of(40, seed=1), name="other", shard_rows=20), tmp_path / "index")
    with pytest.raises(InputError, match=r"index\.faiss: damaged: expected sha256"):
        index.open_files()
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(InputError, match=r"index\.faiss: missing"):
        index.check()
