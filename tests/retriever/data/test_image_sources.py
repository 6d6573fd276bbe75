"""Pairs are read from tars, tables and datasets; missing and broken ones are counted and named."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from image_helpers import SHAPES, captioned, draw, image_bytes, write_shards, write_tar

import retriever.data.images.tars as shards_module
from index.files import InputError
from retriever.config.images import ImageSource
from retriever.data.images.pairs import BrokenPairError, PairSource
from retriever.data.images.sources import open_pairs, tar_files
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
    with pytest.raises(BrokenPairError, match=r"a\.tar: five: expected a caption that is not empty, found none"):
        pairs.read(2)
    with pytest.raises(BrokenPairError, match=r"a\.tar: six: expected an image"):
        pairs.read(3).open()
    with pytest.raises(BrokenPairError, match=r"expected UTF-8 in \.txt"):
        pairs.read(4)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (b'{"caption": "half \\ud83d"}', "expected Unicode text, found half of a surrogate pair"),
        (b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "expected JSON, found: maximum recursion depth"),
        (b'["caption"]', "expected a JSON object in .json"),
        (b'\xef\xbb\xbf["caption"]', "expected a JSON object in .json"),
        (b'{"caption": 5}', "expected a caption that is not empty, found none"),
        (b'{"caption": ', "expected JSON, found"),
        (b"\xff", "expected UTF-8 in .json"),
    ],
    ids=["half a character", "deep", "a list", "byte order mark", "a number", "no JSON", "no UTF-8"],
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


def test_every_lost_sample_is_counted_with_its_reason(tmp_path: Path) -> None:
    png = image_bytes(draw("red", "circle"))
    members = [
        *((f"img.{n:04}.{end}", content) for n in range(3) for end, content in (("jpg", png), ("txt", b"x"))),
        *((f"{n % 2}.{end}", content) for n in range(5) for end, content in (("png", png), ("txt", b"a caption"))),
        # Further images and files of a whole sample are not lost pairs.
        *(("c.png", png), ("c.txt", "\ufeffa cat".encode()), ("c.seg.png", png), ("c.cls", b"1")),
        *(("d.input.jpg", png), ("d.target.jpg", png), ("d.txt", b"which?")),
        *(("__MACOSX/._c.png", png), ("._c.png", png)),
        *(("e.webp", b"second"), ("e.jpg", png), ("e.txt", b"e")),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    pairs = opened(ImageSource(str(path)), tmp_path)
    assert pairs.skipped == 3 + 3 + 2 and len(pairs) == 4
    assert sorted(pairs.notices) == [
        f"hidden images ignored: 2 (first at {path}: __MACOSX/._c.png)",
        f"samples left out because an earlier one of the tar has the same key: 3 (first at {path}: 0)",
        f"samples left out because their name has a dot before the extension: 5 (first at {path}: img.0000)",
    ]
    assert [pairs.location(row) for row in range(4)] == [f"{path}: {key}" for key in "01ce"]
    assert pairs.read(2).captions == ("a cat",)
    assert pairs.read(3, False).location == f"{path}: e" and pairs.read(3).image == png
    strict = write_tar(tmp_path / "b.tar", [(f"i.{n}.{end}", b"x") for n in range(101) for end in ("jpg", "txt")])
    with pytest.raises(InputError, match=r"found none; samples left out because their name has a dot.*: 101 \(first"):
        opened(ImageSource(str(strict)), tmp_path)
    # Faulty members, as of the tars that fuzzing finds.
    sparse = tarfile.TarInfo("s.png")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,0"}
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse)
        tar.addfile(tarfile.TarInfo("s.txt"))
    faulty = opened(ImageSource(str(path)), tmp_path)
    assert (
        f"samples left out with a sparse, huge or truncated member: 1 (first at {path}: s)" in faulty.notices
        and faulty.skipped == 9
    )


def test_a_key_that_no_json_has_is_found_on_opening(tmp_path: Path) -> None:
    source = ImageSource(write_shards(tmp_path / "set"), caption=("json:typo",))
    with pytest.raises(InputError, match=r"expected the key 'typo' in \.json, found caption, captions in 32 samples"):
        opened(source, tmp_path)


def test_compressed_tars_wildcards_and_urls_are_read_like_tars(tmp_path: Path) -> None:
    write_shards(tmp_path / "set")
    plain = opened(ImageSource(str(tmp_path / "set")), tmp_path)
    (tmp_path / "gz").mkdir()
    for shard in (tmp_path / "set").iterdir():
        (tmp_path / "gz" / f"{shard.name}.gz").write_bytes(gzip.compress(shard.read_bytes()))
    url = (tmp_path / "gz").as_uri()
    for path in (tmp_path / "gz", tmp_path / "gz" / "*.tar.gz", f"{url}/{{000..001}}.tar.gz", f"{url}/*.gz"):
        pairs = opened(ImageSource(str(path), format="webdataset"), tmp_path)
        assert pairs.sha256 == plain.sha256 and pairs.read(5) == plain.read(5)
    shutil.rmtree(tmp_path / "gz")
    assert len(opened(ImageSource(f"{url}/{{000..001}}.tar.gz"), tmp_path)) == len(plain)
    (tmp_path / "cut.tgz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    for path, message in (
        (f"{url}/002.tar", r"002\.tar: no such file"),
        ("nothing://a/b.tar", r"nothing://a/b\.tar: cannot be read: Protocol not known"),
        (tmp_path / "cut.tgz", r"cut\.tgz: expected a tar compressed by gzip"),
        (tmp_path / "no*.tar", r"no\*\.tar: no such file"),
        ("pipe:curl x.tar", "pipe:curl x.tar: commands are not run"),
        ("a.tar::b.tar", "expected one path; give each part between :: as a separate source"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            opened(ImageSource(str(path)), tmp_path)
        assert "\n" not in str(caught.value)


def test_class_folders_are_pairs_of_images_and_prompts(tmp_path: Path) -> None:
    for name in ("big_cat/1.png", "dog/2.png", "dog/.x.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(image_bytes(draw("red", "circle")))
    source = ImageSource(str(tmp_path / "set"))
    pairs = opened(source, tmp_path)
    assert [pairs.read(row).captions for row in range(2)] == [("a photo of a big cat.",), ("a photo of a dog.",)]
    assert pairs.read(1).open().size == (48, 40) and pairs.location(1).endswith("dog/2.png") and pairs.notices
    several = opened(dataclasses.replace(source, prompts=("{c}!", "one {}")), tmp_path)
    assert several.read(0).captions == ("big cat!", "one big cat") and several.sha256 != pairs.sha256
    (tmp_path / "set" / "classnames.txt").write_text("tiger|lion\nwolf\n")
    assert opened(source, tmp_path).read(0).captions == ("a photo of a tiger.", "a photo of a lion.")
    with pytest.raises(InputError, match=r"expected \{c\} in each of them, found none in 'cat'"):
        opened(dataclasses.replace(source, prompts=("cat",)), tmp_path)


@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_parquet_files_with_images_are_read_by_row(kind: str, tmp_path: Path) -> None:
    contents = [image_bytes(draw(color, shape)) for color in ("red", "blue") for shape in SHAPES]
    (tmp_path / "own.png").write_bytes(contents[0])
    cells: list[object] = list(contents) if kind == "binary" else [{"bytes": each, "path": None} for each in contents]
    cells += [None] if kind == "binary" else [{"bytes": None, "path": "own.png"}]
    texts = [[f"text {n}", f"another {n}"] for n in range(len(cells))]
    table = pyarrow.table({"image": cells, "captions": texts})
    for number in range(2):
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=5)
    pairs = opened(ImageSource(str(tmp_path / "{0..1}.parquet")), tmp_path)
    assert len(pairs) == 18 and pairs.location(17) == "1.parquet: row 9"
    again = copy.copy(pairs)
    assert [again.read(row).image for row in (0, 6, 12)] == [contents[row % 9] for row in (0, 6, 12)]
    assert again.read(16).captions == ("text 7", "another 7") and again.read(16, False).image == b""
    if kind == "binary":
        with pytest.raises(BrokenPairError, match=r"0\.parquet: row 9: expected an image, found none in its cell"):
            pairs.read(8)
    else:
        assert pairs.read(8).image == contents[0]
    with pytest.raises(InputError, match=r"expected a column 'alt', found image, captions"):
        opened(ImageSource(str(tmp_path / "0.parquet"), caption=("alt",)), tmp_path)


def test_an_index_is_built_once_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = write_shards(tmp_path / "set", 3)
    scanned: list[str] = []
    scan = shards_module.scan_tar

    def watched(shard: Path, captions: bool) -> object:
        if len(scanned) == 2:
            raise KeyboardInterrupt
        scanned.append(shard.name)
        return scan(shard, captions)

    monkeypatch.setattr(shards_module, "scan_tar", watched)
    with pytest.raises(KeyboardInterrupt):
        index_shards(pattern, tar_files(pattern, tmp_path / "cache"), tmp_path / "cache")
    scanned.pop()
    index_shards(pattern, tar_files(pattern, tmp_path / "cache"), tmp_path / "cache")
    assert scanned == ["000.tar", "002.tar"]
    index_shards(pattern, tar_files(pattern, tmp_path / "cache"), tmp_path / "cache")
    assert scanned == ["000.tar", "002.tar"]
    # A tar that has changed is indexed again.
    write_tar(tmp_path / "set" / "001.tar", [("a.png", b"x"), ("a.txt", b"y")])
    scanned.clear()
    index_shards(pattern, tar_files(pattern, tmp_path / "cache"), tmp_path / "cache")
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
    # The columns of open_clip, in its default format.
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\nimages/1.png\ta circle\n")
    assert opened(ImageSource(str(tmp_path / "pairs.tsv")), tmp_path).read(0).captions == ("a circle",)
    (tmp_path / "pairs.tsv").rename(tmp_path / "open_clip.csv")
    with pytest.raises(
        InputError, match=r"expected a column 'image' or .*; cells separated by tabs are read from a .tsv"
    ):
        opened(ImageSource(str(tmp_path / "open_clip.csv")), tmp_path)
    (tmp_path / "urls.csv").write_text("image,caption\nhttps://a/b.jpg,a circle\n")
    with pytest.raises(InputError, match=r"urls\.csv:2: expected the path of an image file .*, found a URL"):
        opened(ImageSource(str(tmp_path / "urls.csv")), tmp_path)
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
