"""Images of tars, tables and datasets are encoded like those of a folder, by any number of ranks."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from image_helpers import captioned, image_bytes, save_checkpoint, write_shards, write_tar

import retriever
from index.files import InputError
from index.progress import SilentReporter
from index.store.reader import EmbeddingStore
from retriever.distributed.ranks import Ranks
from retriever.encoding import image_store
from retriever.encoding.image_items import FolderImages
from retriever.encoding.model import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A CLIP model with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    save_checkpoint("clip", folder)
    return retriever.load(folder, device="cpu")


def by_text(store: EmbeddingStore) -> dict[str, np.ndarray]:
    texts = [passage.text for passage in store.passages()]
    return dict(zip(texts, store.vectors(), strict=True))


def test_every_source_of_the_same_images_gives_the_same_vectors(model: Model, tmp_path: Path) -> None:
    pairs = captioned()
    (tmp_path / "folder").mkdir()
    rows = []
    for number, (image, caption) in enumerate(pairs):
        (tmp_path / "folder" / f"{number} a.png").write_bytes(image_bytes(image))
        rows.append({"filepath": f"folder/{number} a.png", "title": [caption, f"a {caption}"], "n": number})
    members = [(f"{number:03}.png", image_bytes(image)) for number, (image, _) in enumerate(pairs)]
    members += [(f"{number:03}.txt", caption.encode()) for number, (_, caption) in enumerate(pairs)]
    write_tar(tmp_path / "shards" / "0.tar", [*members, ("bare.png", image_bytes(pairs[0][0])), ("b.jpg", b"broken")])
    # Rows of the same image are one image with the captions of all.
    lines = [{**row, "title": text} for row in rows for text in row["title"]]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    contents, captions = [image_bytes(image) for image, _ in pairs], [caption for _, caption in pairs]
    cells = {"image": contents, "caption": captions, "id": range(32)}
    pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "stored.parquet", row_group_size=5)
    names = ("folder", "shards", "table.jsonl", "stored.parquet")
    folder, shards, table, stored = (retriever.encode(model, tmp_path / n, tmp_path / f"{n} store") for n in names)
    expected = dict(zip(folder.ids(), folder.vectors(), strict=True))
    assert unquote(next(iter(folder.ids()))) == "0 a.png" == next(folder.passages()).text
    for number, (_, caption) in enumerate(pairs):
        vector = expected[f"{number}%20a.png"]
        assert np.allclose(by_text(shards)[caption], vector, atol=1e-6)
        assert np.allclose(by_text(stored)[caption], vector, atol=1e-6)
    assert list(stored.ids()) == [str(number) for number in range(32)]
    assert list(shards.ids())[:2] == ["0.tar/000", "0.tar/001"] and by_text(shards)["0.tar/bare"] is not None
    left_out = [json.loads(line) for line in (shards.folder / image_store.LEFT_OUT).read_text().splitlines()]
    assert [(line["id"], line["reason"][:23]) for line in left_out] == [("0.tar/b", "expected an image, foun")]
    assert [unquote(id_) for id_ in table.ids()] == [row["filepath"] for row in rows]
    assert next(table.passages()).text == "red circle / a red circle"
    kept = retriever.encode(model, tmp_path / "table.jsonl", tmp_path / "kept", fields=["n"])
    assert [passage.fields for passage in kept.passages()][:2] == [{"n": 0}, {"n": 1}]
    shards, options = write_shards(tmp_path / "set"), {"caption": "json:captions", "fields": ["caption"]}
    first = next(retriever.encode(model, shards, tmp_path / "pattern", **options).passages())
    assert (first.text, first.fields) == ("red circle / a red circle", {"caption": "red circle"})
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "a text", "path": "x.html"}\n')
    assert retriever.encode(model, tmp_path / "corpus.jsonl", tmp_path / "corpus").rows == 1
    for data, options, message in (
        ("table.jsonl", {"image": "photo"}, r"table\.jsonl:1: expected a column 'photo'"),
        ("shards", {"caption": "cls"}, r"caption: expected txt or json:KEY, found 'cls'"),
        ("corpus.jsonl", {"caption": "title"}, r"expected images for the columns 'title', found a corpus"),
    ):
        with pytest.raises(InputError, match=message):
            retriever.encode(model, tmp_path / data, tmp_path / "refused", **options)


class ThreadRanks(Ranks):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, values: list[Any]) -> None:
        super().__init__(rank, world_size)
        self.__dict__.update(_barrier=barrier, _values=values)

    @property
    def group(self) -> None:
        """No process group: what the ranks were given is not compared."""

    def barrier(self) -> None:
        self._barrier.wait(60)

    def all_gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self.barrier()
        found = json.loads(json.dumps(list(self._values)))
        self.barrier()
        return found

    def all_gather_rows(self, rows: np.ndarray) -> list[np.ndarray]:
        self._values[self.rank] = rows
        self.barrier()
        found = list(self._values)
        self.barrier()
        return found

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]


def test_the_store_does_not_depend_on_the_number_of_ranks(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_store, "DECODE_BATCH", 4)
    (tmp_path / "set").mkdir()
    for number, (image, _) in enumerate(captioned()):
        (tmp_path / "set" / f"{number:02}.png").write_bytes(b"broken" if number in (3, 9) else image_bytes(image))

    def encoded(name: str, ranks: Ranks) -> EmbeddingStore:
        items = FolderImages(tmp_path / "set")
        return image_store.encode_images(
            model.image_towers(), items, tmp_path / name, model.options, SilentReporter(), shard_rows=5, ranks=ranks
        )

    alone = encoded("one", Ranks())
    barrier, values = threading.Barrier(3), [None] * 3
    ranks = [ThreadRanks(rank, 3, barrier, values) for rank in range(3)]
    threads = [threading.Thread(target=encoded, args=("three", each)) for each in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    three = EmbeddingStore.open(tmp_path / "three")
    assert list(three.ids()) == list(alone.ids()) and three.rows == 30
    assert np.array_equal(three.vectors(), alone.vectors())
    names = [json.loads(line)["id"] for line in (tmp_path / "three" / image_store.LEFT_OUT).read_text().splitlines()]
    assert names == ["03.png", "09.png"]
