"""Pairs are read from tars, tables and datasets; missing and broken ones are counted and named."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from image_helpers import captioned, draw, image_bytes, write_shards, write_tar

import retriever.data.images.tars as shards_module
from index.files import InputError
from retriever.config.images import ImageSource
from retriever.data.images.sources import BrokenPairError, PairSource, open_pairs
from retriever.data.images.tars import expand_braces, index_shards


def opened(source: ImageSource, tmp_path: Path, workers: int = 0) -> PairSource:
    return open_pairs(source, tmp_path / "cache", workers=workers)


def test_braces_expand_to_ranges_lists_and_products() -> None:
    assert expand_braces("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expand_braces("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    with pytest.raises(InputError, match=r"expected an ascending range, found \{3\.\.1\}"):
        expand_braces("{3..1}.tar")
    for many in ("{0..1000000}.tar", "{0.." + "9" * 5000 + "}", "{1..1000}{1..1000}{1..2}", "{a}" * 1000):
        with pytest.raises(InputError, match="expected at most"):
            expand_braces(many)


def test_members_that_are_not_what_their_header_says_are_counted(tmp_path: Path) -> None:
    """Sizes of pax headers: negative, beyond the end of the tar, and a sparse member."""
    image = image_bytes(draw("red", "circle"))

    def write(name: str, **headers: str) -> Path:
        with tarfile.open(tmp_path / name, "w", format=tarfile.PAX_FORMAT) as tar:
            for key, pax in (("a", {}), ("b", headers), ("c", {})):
                for suffix, content in ((".jpg", image), (".txt", b"a caption")):
                    member = tarfile.TarInfo(key + suffix)
                    member.size, member.pax_headers = len(content), pax if suffix == ".jpg" else {}
                    tar.addfile(member, io.BytesIO(content))
        return tmp_path / name

    sparse = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(10**12), "GNU.sparse.map": "0,1"}
    pairs = opened(ImageSource(str(write("sparse.tar", **sparse))), tmp_path)
    assert len(pairs) == 2 and pairs.skipped == 1 and "sparse, huge or truncated" in pairs.notices[0]
    for number, size in enumerate(("-1024", "-100000", str(10**15), "x" * 50, "9" * 5000)):
        tar = write(f"size{number}.tar", size=size)
        try:
            pairs = opened(ImageSource(str(tar)), tmp_path)
            assert pairs.skipped and all(pairs.read(row).image for row in range(len(pairs)))
        except InputError as error:
            assert str(error).startswith(f"{tar}: expected")


def test_a_table_that_names_a_pipe_a_device_or_a_huge_file_counts_it_as_broken(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with open(tmp_path / "huge.jpg", "wb") as huge:
        huge.truncate(2**40)
    names = ("pipe.jpg", "/dev/zero", "huge.jpg", ".")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"image": n, "caption": "c"}) + "\n" for n in names))
    pairs = opened(ImageSource(str(tmp_path / "t.jsonl")), tmp_path)
    for row, expected in enumerate(("named pipe", "device", "at most 268,435,456 bytes", "folder")):
        with pytest.raises(BrokenPairError, match=expected):
            pairs.read(row)


@pytest.mark.parametrize("workers", [0, 2])
def test_tars_give_every_pair_once(workers: int, tmp_path: Path) -> None:
    pairs = opened(ImageSource(write_shards(tmp_path / "set", 3)), tmp_path, workers)
    expected = {caption for _, caption in captioned()}
    found = [pairs.read(row) for row in range(len(pairs))]
    assert {pair.captions for pair in found} == {(caption,) for caption in expected} and len(found) == len(expected)
    assert len({pair.key for pair in found}) == len(found)
    assert all(pair.open().size == (48, 40) for pair in found)
    assert pairs.read(0, False).image == b"" and not pairs.notices
    # A folder of tars is the same source, and a pickled copy reads the same.
    folder = opened(ImageSource(str(tmp_path / "set")), tmp_path)
    again = copy.copy(folder)
    assert folder.sha256 == pairs.sha256 and again.read(5) == pairs.read(5)


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (("json:caption",), ("red circle",)),
        (("json:captions",), ("red circle", "a red circle")),
        (("txt", "json:captions"), ("red circle", "a red circle")),
    ],
)
def test_captions_come_from_the_configured_members(
    captions: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path
) -> None:
    pairs = opened(ImageSource(write_shards(tmp_path / "set"), caption=captions), tmp_path)
    assert pairs.read(0).captions == expected


def test_samples_without_image_or_caption_are_skipped_and_counted(tmp_path: Path) -> None:
    png = image_bytes(draw("red", "circle"))
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("one.png", png),
            ("one.txt", b"first\nsecond\n"),
            ("two.png", png),
            ("three.txt", b"no image"),
            ("four.png", png),
            ("four.txt", b""),
            ("x/one.PNG", png),
            ("x/one.txt", b"in a folder"),
            ("five.png", png),
            ("five.txt", b" \n"),
            ("six.png", b"broken"),
            ("six.txt", b"six"),
            ("seven.png", png),
            ("seven.txt", b"\xff\xfe"),
            ("__meta__", b"x"),
        ],
    )
    pairs = opened(ImageSource(str(path)), tmp_path)
    assert len(pairs) == 5
    assert pairs.notices == [
        f"samples left out without a caption: 2 (first at {path}: two)",
        f"samples left out without an image: 1 (first at {path}: three)",
    ]
    assert [pairs.read(row).captions for row in (0, 1)] == [("first", "second"), ("in a folder",)]
    with pytest.raises(
        BrokenPairError, match=r"a\.tar: image at byte \d+: expected a caption that is not empty, found none"
    ):
        pairs.read(2)
    with pytest.raises(BrokenPairError, match=r"a\.tar: image at byte \d+: expected an image"):
        pairs.read(3).open()
    with pytest.raises(BrokenPairError, match=r"expected UTF-8 in \.txt"):
        pairs.read(4)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (b'{"caption": "half \\ud83d"}', "expected Unicode text, found half of a surrogate pair"),
        (b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "expected JSON, found: maximum recursion depth"),
        (b'["caption"]', "expected a JSON object in .json"),
        (b'{"caption": 5}', "expected a caption that is not empty, found none"),
        (b'{"caption": ', "expected JSON, found"),
        (b"\xff", "expected UTF-8 in .json"),
    ],
    ids=["half a character", "deep", "a list", "a number", "no JSON", "no UTF-8"],
)
def test_an_invalid_caption_breaks_only_its_pair(about: bytes, message: str, tmp_path: Path) -> None:
    png = image_bytes(draw("red", "circle"))
    good = '{"caption": "è 🙂"}'.encode()
    members = [("a.png", png), ("a.json", about), ("ünï/日本.png", png), ("ünï/日本.json", good)]
    pairs = opened(ImageSource(str(write_tar(tmp_path / "a.tar", members))), tmp_path)
    with pytest.raises(BrokenPairError, match=re.escape(message)) as caught:
        pairs.read(0)
    assert "\n" not in str(caught.value)
    assert pairs.read(1).captions == ("è 🙂",)


def test_an_index_is_built_once_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_shards(tmp_path / "set", 3)
    scanned: list[str] = []
    scan = shards_module._scan

    def watched(shard: Path) -> object:
        if len(scanned) == 2:
            raise KeyboardInterrupt
        scanned.append(shard.name)
        return scan(shard)

    monkeypatch.setattr(shards_module, "_scan", watched)
    with pytest.raises(KeyboardInterrupt):
        index_shards(pattern, tmp_path / "cache")
    scanned.pop()
    index_shards(pattern, tmp_path / "cache")
    assert scanned == ["000.tar", "002.tar"]
    index_shards(pattern, tmp_path / "cache")
    assert scanned == ["000.tar", "002.tar"]
    # A tar that has changed is indexed again.
    write_tar(tmp_path / "set" / "001.tar", [("a.png", b"x"), ("a.txt", b"y")])
    scanned.clear()
    index_shards(pattern, tmp_path / "cache")
    assert scanned == ["001.tar"]


def test_invalid_tars_are_one_line_errors(tmp_path: Path) -> None:
    whole = Path(write_shards(tmp_path / "set", 1).replace("{000..000}", "000"))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:700])
    for path, message in [
        (cut, r"cut\.tar: expected an uncompressed tar, found one that cannot be read"),
        (write_tar(tmp_path / "empty.tar", [("readme", b"x")]), r"expected samples of KEY\.jpg"),
        (tmp_path / "set" / "{000..001}.tar", r"001\.tar: no such file \(of "),
    ]:
        with pytest.raises(InputError, match=message):
            opened(ImageSource(str(path)), tmp_path)
    with pytest.raises(InputError, match=r"expected txt or json:KEY, found 'cls'"):
        opened(ImageSource(str(whole), caption=("cls",)), tmp_path)
    pairs = opened(ImageSource(str(whole)), tmp_path)
    whole.write_bytes(whole.read_bytes()[:4000])
    with pytest.raises(InputError, match=r"000\.tar: expected \d+ bytes at \d+, found") as caught:
        pairs.read(len(pairs) - 1)
    assert not isinstance(caught.value, BrokenPairError)


def test_paths_of_a_table_are_relative_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    draw("red", "circle").save(tmp_path / "images" / "1.png")
    rows = [
        {"image": "images/1.png", "caption": ["red circle", "circle"]},
        {"image": "images/none.png", "caption": "x"},
        {"image": "images/1.png", "caption": ""},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = opened(ImageSource(str(tmp_path / "pairs.jsonl")), tmp_path)
    assert len(pairs) == 2 and "empty positive: 1" in pairs.notices[0]
    first = copy.copy(pairs).read(0)
    assert first.captions == ("red circle", "circle") and first.open().size == (48, 40)
    with pytest.raises(BrokenPairError, match=r"none\.png: no such file"):
        pairs.read(1)
    (tmp_path / "pairs.csv").write_text("file,words\nimages/1.png,a circle\n")
    other = opened(ImageSource(str(tmp_path / "pairs.csv"), image="file", caption=("words",)), tmp_path)
    assert other.read(0).captions == ("a circle",) and other.read(0).image == first.image


@pytest.mark.parametrize("kind", ["tar", "csv"])
def test_too_many_empty_captions_are_refused_on_opening(kind: str, tmp_path: Path) -> None:
    def written(empty: int, good: int) -> ImageSource:
        texts = [""] * empty + ["a circle"] * good
        path = tmp_path / f"{empty}.{kind}"
        if kind == "tar":
            members = [
                (f"{n}.{end}", x) for n, text in enumerate(texts) for end, x in (("png", b"x"), ("txt", text.encode()))
            ]
            write_tar(path, members)
        else:
            path.write_text("image,caption\n" + "".join(f"{n}.png,{text}\n" for n, text in enumerate(texts)))
        return ImageSource(str(path))

    pairs = opened(written(100, 20), tmp_path)
    assert (len(pairs), pairs.skipped) == (20, 100)
    source = written(101, 20)
    message = r"101 of 121 pairs are broken, more than max_broken \(0\.01\) allows; .*: 101 \(first at "
    # The second time the index is in the cache.
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            opened(source, tmp_path)
    assert len(opened(dataclasses.replace(source, max_broken=0.9), tmp_path)) == 20


def test_a_hugging_face_dataset_with_an_image_column(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [draw("red", "circle"), draw("blue", "cross")]
    columns = {"image": images, "caption": ["red circle", "blue cross"], "n": [1, 2]}
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string"), "n": datasets.Value("int64")}
    )
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "set")
    source = ImageSource(str(tmp_path / "set"))
    pairs = opened(source, tmp_path)
    assert [pairs.read(row).captions for row in range(2)] == [("red circle",), ("blue cross",)]
    assert pairs.read(1).open().tobytes() == images[1].tobytes()
    assert opened(source, tmp_path).sha256 == pairs.sha256
    with pytest.raises(InputError, match="expected a column 'alt', found image, caption, n"):
        opened(dataclasses.replace(source, caption=("alt",)), tmp_path)
