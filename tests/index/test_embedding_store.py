"""Tests."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from index_helpers import HEADER, MODEL, five_rows, listing, passages_of

from index.files import InputError
from index.manifest import FileEntry, read_manifest
from index.passages import Passage
from index.store.reader import EmbeddingStore
from index.store.shards import ShardBuffer, passage_line
from index.store.writer import EmbeddingWriter
from index.verify import verify


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_store_round_trip(tmp_path: Path, rng, dtype: str, rows: int, batch: int) -> None:
    vectors = rng.standard_normal((rows, 3))
    passages = passages_of([f"d{row}" for row in range(rows)])
    with EmbeddingWriter(tmp_path / "emb", **HEADER, dtype=dtype) as writer:
        for start in range(0, rows, batch):
            writer.append(passages[start : start + batch], vectors[start : start + batch])
            assert writer.rows == min(rows, start + batch) // 4 * 4
    store = EmbeddingStore.open(tmp_path / "emb", verify="hash")
    assert (store.rows, store.dim, store.dtype, store.model) == (rows, 3, dtype, MODEL)
    np.testing.assert_array_equal(store.vectors(), vectors.astype(dtype))
    assert list(store.ids()) == [f"d{row}" for row in range(rows)]
    assert list(store.passages()) == passages
    firsts = [first for first, _ in store.shards()]
    assert firsts == list(range(0, rows, 4))
    assert all(isinstance(shard, np.memmap) and not shard.flags.writeable for _, shard in store.shards())


def test_batch_sizes_do_not_change_the_bytes_of_a_store(tmp_path: Path, rng) -> None:
    vectors, passages = rng.standard_normal((11, 3)), passages_of([f"d{n}" for n in range(11)])
    for name, batch in (("one", 11), ("two", 3)):
        with EmbeddingWriter(tmp_path / name, **HEADER) as writer:
            for start in range(0, 11, batch):
                writer.append(passages[start : start + batch], vectors[start : start + batch])
    assert listing(tmp_path / "one") == listing(tmp_path / "two")


def test_adopt_shard_adds_a_shard_of_another_process(tmp_path: Path, rng) -> None:
    vectors, passages = rng.standard_normal((9, 3)).astype(np.float32), passages_of(list("abcdefghi"))
    with EmbeddingWriter(tmp_path / "one", **HEADER) as writer:
        writer.append(passages, vectors)

    def shard(number: int, some: list[Passage]) -> dict[str, FileEntry]:
        buffer = ShardBuffer()
        lines = [passage_line(passage, "") for passage in some]
        buffer.add([passage.id for passage in some], vectors[4 * number : 4 * number + len(some)], lines)
        return buffer.write(tmp_path / "two", number)

    with EmbeddingWriter(tmp_path / "two", **HEADER) as writer:
        writer.adopt_shard(4, shard(0, passages[:4]))
        again = [*passages[4:7], passages[1]]
        with pytest.raises(InputError, match="expected unique ids, found 'b' in rows 1 and 7"):
            writer.adopt_shard(4, shard(1, again))
        assert writer.rows == 4
        files = shard(1, passages[4:8])
        (tmp_path / "two" / "00001.npy").rename(tmp_path / "elsewhere")
        with pytest.raises(InputError, match=r"00001\.npy: expected the file that another process wrote"):
            writer.adopt_shard(4, files)
        (tmp_path / "elsewhere").rename(tmp_path / "two" / "00001.npy")
        writer.adopt_shard(4, files)
        writer.append(passages[8:], vectors[8:])
        with pytest.raises(ValueError, match="expected a store with nothing in memory"):
            writer.adopt_shard(1, {})
    assert listing(tmp_path / "one") == listing(tmp_path / "two")


def test_a_closed_writer_does_not_change_the_manifest(tmp_path: Path) -> None:
    five_rows(tmp_path / "one", complete=True)
    writer = EmbeddingWriter(tmp_path / "two", **HEADER)
    writer.__exit__(RuntimeError, None, None)
    for path in (tmp_path / "one").glob("00000.*"):
        path.rename(tmp_path / "two" / path.name)
    files = {name: entry for name, entry in read_manifest(tmp_path / "one").files.items() if name < "00001"}
    with pytest.raises(ValueError, match="two: no longer held by this writer"):
        writer.adopt_shard(4, files)
    assert read_manifest(tmp_path / "two").count("rows") == 0


def test_store_files_are_readable_by_numpy_and_json(tmp_path: Path, make_store: Callable, rng) -> None:
    vectors = rng.standard_normal((9, 3)).astype(np.float32)
    make_store(vectors)
    np.testing.assert_array_equal(np.load(tmp_path / "emb" / "00001.npy"), vectors[7:])
    assert (tmp_path / "emb" / "00001.ids").read_text() == "d7\nd8\n"
    lines = (tmp_path / "emb" / "00000.jsonl").read_bytes().split(b"\n")
    assert json.loads(lines[0]) == {"_id": "d0", "title": "title d0", "text": "text of d0\nsecond line \u2028 é"}


def test_ids_of_any_characters_are_kept(make_store: Callable) -> None:
    ids = ["é", "e\u0301", "😀", "\u200b", "٣", "a/../b", '"quoted"', "\ufeffbom", "x" * 5000, "\ufffd", "-1"]
    store = make_store(np.ones((len(ids), 2)), ids, shard_rows=2)
    assert list(store.ids()) == ids
    assert [passage.id for passage in store.passages()] == ids


@pytest.mark.parametrize("bad", ["a b", "", "a\u2028", "\ud83d"])
def test_an_invalid_id_is_refused_with_its_row(tmp_path: Path, bad: str) -> None:
    with (
        pytest.raises(InputError, match="row 1: expected an id without white space"),
        EmbeddingWriter(tmp_path / "emb", **HEADER) as writer,
    ):
        writer.append(passages_of(["ok", bad]), np.ones((2, 3)))


def test_a_text_that_cannot_be_written_is_refused_with_its_id(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="row 0: expected Unicode text, found half of a surrogate pair in passage 'x'"),
        EmbeddingWriter(tmp_path / "emb", **HEADER) as writer,
    ):
        writer.append([Passage("x", "", "\ud83d")], np.ones((1, 3)))


@pytest.mark.parametrize(("first", "second"), [(1, 6), (4, 5), (5, 7), (0, 9)])
def test_a_duplicate_id_is_refused_naming_both_rows(tmp_path: Path, first: int, second: int) -> None:
    ids = [f"d{n}" for n in range(10)]
    ids[second] = ids[first]
    with (
        pytest.raises(InputError, match=f"unique ids, found 'd{first}' in rows {first} and {second} "),
        EmbeddingWriter(tmp_path / "emb", **HEADER) as writer,
    ):
        for start in range(0, 10, 5):
            writer.append(passages_of(ids[start : start + 5]), np.ones((5, 3)))


def test_a_refused_batch_adds_no_rows(tmp_path: Path, rng) -> None:
    vectors, passages = rng.standard_normal((6, 3)), passages_of([f"d{n}" for n in range(6)])
    with EmbeddingWriter(tmp_path / "emb", **HEADER) as writer:
        writer.append(passages[:3], vectors[:3])
        with pytest.raises(InputError, match="unique ids"):
            writer.append([passages[3], passages[0]], vectors[:2])
        with pytest.raises(InputError, match="finite"):
            writer.append(passages[3:5], np.full((2, 3), np.nan))
        writer.append(passages[3:], vectors[3:])
    assert list(EmbeddingStore.open(tmp_path / "emb").ids()) == [passage.id for passage in passages]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_vectors_are_refused_with_their_passage(tmp_path: Path, value: float) -> None:
    vectors = np.ones((3, 3), np.float32)
    vectors[2, 1] = value
    with (
        pytest.raises(InputError, match="row 2, passage 'c': expected a finite vector, found NaN or infinity"),
        EmbeddingWriter(tmp_path / "emb", **HEADER) as writer,
    ):
        writer.append(passages_of(["a", "b", "c"]), vectors)


def test_a_number_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="row 0, passage 'a': expected a finite vector, found one too large"),
        EmbeddingWriter(tmp_path / "emb", **HEADER, dtype="float16") as writer,
    ):
        writer.append(passages_of(["a"]), np.full((1, 3), 1e5))


def test_vectors_of_another_shape_are_refused(tmp_path: Path) -> None:
    with EmbeddingWriter(tmp_path / "emb", **HEADER) as writer:
        for shape in ((2, 4), (1, 3), (2, 3, 1)):
            with pytest.raises(ValueError, match="vectors: expected shape"):
                writer.append(passages_of(["a", "b"]), np.ones(shape))


def test_an_interrupted_run_resumes_after_the_last_complete_shard(tmp_path: Path, rng) -> None:
    vectors, passages = rng.standard_normal((11, 3)), passages_of([f"d{n}" for n in range(11)])
    folder = tmp_path / "emb"
    with pytest.raises(KeyboardInterrupt), EmbeddingWriter(folder, **HEADER) as writer:
        writer.append(passages[:7], vectors[:7])
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="incomplete, 4 rows so far; run the same encode again"):
        EmbeddingStore.open(folder)
    with pytest.raises(InputError, match="incomplete"):
        verify(folder)
    with EmbeddingWriter(folder, **HEADER) as writer:
        assert (writer.rows, writer.complete) == (4, False)
        with pytest.raises(InputError, match="'d1' in rows 1 and 4 "):
            writer.append(passages_of(["d1"]), np.ones((1, 3)))
        writer.append(passages[4:], vectors[4:])
    with EmbeddingWriter(tmp_path / "undisturbed", **HEADER) as writer:
        writer.append(passages, vectors)
    assert listing(folder) == listing(tmp_path / "undisturbed")


def test_a_complete_store_is_not_changed(tmp_path: Path) -> None:
    folder = tmp_path / "emb"
    with EmbeddingWriter(folder, **HEADER) as writer:
        writer.append(passages_of(["a"]), np.ones((1, 3)))
    before = listing(folder)
    with EmbeddingWriter(folder, **HEADER) as writer:
        assert (writer.rows, writer.complete) == (1, True)
        with pytest.raises(ValueError, match="complete"):
            writer.append(passages_of(["b"]), np.ones((1, 3)))
    assert listing(folder) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 4}, r"another dim \(3, now 4\)"),
        ({"dtype": "float16"}, r"another dtype \('float32', now 'float16'\)"),
        ({"model": {"sha256": "cd"}}, r"another model \(\{'sha256': 'abab.*now \{'sha256': 'cd'\}\)"),
        ({"source": {"file": "d.jsonl"}}, r"another source \(\{'file': 'c.jsonl'\}, now \{'file': 'd.jsonl'\}\)"),
        ({"shard_rows": 5}, r"another shard_rows \(4, now 5\)"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("complete", [False, True])
def test_a_store_with_another_header_is_not_resumed(tmp_path: Path, change: dict, message: str, complete: bool) -> None:
    folder = five_rows(tmp_path / "emb", complete)
    before = listing(folder)
    with pytest.raises(InputError, match=message + "; remove the folder or choose another folder") as caught:
        EmbeddingWriter(folder, **{**HEADER, **change})
    assert "\n" not in str(caught.value)
    assert listing(folder) == before


def test_folders_with_other_files_are_refused_and_not_changed(tmp_path: Path) -> None:
    for name in ("00000.npy", "notes.txt"):
        folder = tmp_path / name.partition(".")[2]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(InputError, match=f"expected an empty folder or an embedding store, found {name}"):
            EmbeddingWriter(folder, **HEADER)
        assert (folder / name).read_text() == "mine"


def test_leftovers_of_a_killed_run_are_removed_and_never_read(tmp_path: Path, rng) -> None:
    folder = tmp_path / "emb"
    folder.mkdir()
    (folder / ".manifest.json.01234567.tmp").write_text("half")
    vectors, passages = rng.standard_normal((6, 3)), passages_of([f"d{n}" for n in range(6)])
    with pytest.raises(RuntimeError), EmbeddingWriter(folder, **HEADER) as writer:
        writer.append(passages[:4], vectors[:4])
        raise RuntimeError
    (folder / "00001.npy").write_text("whole but never entered")
    (folder / "00009.ids").write_text("of a longer run")
    (folder / ".00001.ids.89abcdef.tmp").write_text("half")
    with EmbeddingWriter(folder, **HEADER) as writer:
        writer.append(passages[4:], vectors[4:])
    assert sorted(os.listdir(folder)) == sorted(
        ["manifest.json", *(f"0000{n}.{suffix}" for n in (0, 1) for suffix in ("npy", "ids", "jsonl"))]
    )
    np.testing.assert_array_equal(EmbeddingStore.open(folder, verify="hash").vectors(), vectors.astype(np.float32))


def test_two_writers_do_not_share_a_folder(tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match="another process is writing here")
    with EmbeddingWriter(tmp_path / "emb", **HEADER), refused:
        EmbeddingWriter(tmp_path / "emb", **HEADER)
    assert EmbeddingStore.open(tmp_path / "emb").rows == 0


@pytest.mark.parametrize("limit", [100, 240, 600, 1000, 1300])
def test_a_full_disk_leaves_only_complete_shards(tmp_path: Path, rng, limit: int) -> None:
    """The system refuses files beyond `limit` bytes, so that the manifest, the vectors or the passages cannot be
    written.
    """
    header = {**HEADER, "shard_rows": 10}
    vectors, passages = rng.standard_normal((25, 3)), passages_of([f"d{n}" for n in range(25)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large: '"), EmbeddingWriter(tmp_path / "emb", **header) as writer:
            writer.append(passages, vectors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [name for name in os.listdir(tmp_path / "emb") if name.endswith(".tmp")]
    with pytest.raises(InputError, match=r"incomplete|found no manifest\.json"):
        EmbeddingStore.open(tmp_path / "emb")
    with EmbeddingWriter(tmp_path / "emb", **header) as writer:
        writer.append(passages[writer.rows :], vectors[writer.rows :])
    with EmbeddingWriter(tmp_path / "undisturbed", **header) as writer:
        writer.append(passages, vectors)
    assert listing(tmp_path / "emb") == listing(tmp_path / "undisturbed")


def test_memory_depends_on_rows_added_not_on_shard_size(tmp_path: Path) -> None:
    with EmbeddingWriter(tmp_path / "emb", **{**HEADER, "shard_rows": 10**12}) as writer:
        writer.append(passages_of(["a"]), np.ones((1, 3)))
        writer.append(passages_of(["b"]), np.zeros((1, 3)))
    store = EmbeddingStore.open(tmp_path / "emb")
    np.testing.assert_array_equal(store.vectors(), np.array([[1, 1, 1], [0, 0, 0]], np.float32))


def test_appended_arrays_are_copied(tmp_path: Path) -> None:
    """In any memory layout."""
    vectors = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    with EmbeddingWriter(tmp_path / "emb", **HEADER) as writer:
        writer.append(passages_of(["a", "b"]), vectors)
        vectors[:] = 9
    np.testing.assert_array_equal(EmbeddingStore.open(tmp_path / "emb").vectors(), np.arange(6).reshape(2, 3))
