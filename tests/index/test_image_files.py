"""One rule says which files of a folder and which members of a tar are images; everything else is counted."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from index.files import InputError
from index.image_files.classes import class_folders, read_class_names
from index.image_files.folders import IMAGES, is_hidden, list_image_folder
from index.image_files.tars import member_name, tar_members, visible_samples


def test_formats_of_pillow_are_images_and_all_else_is_counted(tmp_path: Path) -> None:
    Image.init()
    assert set(IMAGES) - {".mpo"} <= set(Image.registered_extensions())
    kept = ["a.png", "b.avif", "c.JFIF", "d/e.jp2", "d/f.ppm"]
    for name in (
        *kept,
        ".hidden.png",
        ".ipynb_checkpoints/a.png",
        "__MACOSX/a.png",
        "notes.txt",
        "d/raw.cr2",
        "README",
    ):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "z.png").write_bytes(b"x")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "set" / "d" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = list_image_folder(tmp_path / "set")
    assert [file.relative_to(tmp_path / "set").as_posix() for file in found.files] == [*kept, "linked/z.png"]
    assert sorted(found.notices) == [
        "broken links and special files ignored: 1 (first gone.png)",
        "files ignored that are not images: 3 (without a suffix 1, .cr2 1, .txt 1)",
        "hidden files and folders ignored: 3 (first .hidden.png)",
        "links to a folder above them ignored: 1 (first d/back)",
    ]
    assert not is_hidden("./a/../b.png") and is_hidden("x/._a.png") and is_hidden("__meta__")


def test_class_folders_have_names_and_say_what_they_ignore(tmp_path: Path) -> None:
    for name in ("big_cat/1.png", "dog/1.png", "dog/.x.png", ".git/1.png", "loose.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = class_folders(tmp_path)
    assert found.names == [("big cat",), ("dog",)] and [len(files) for files in found.files] == [1, 1]
    assert found.notices == [
        "dog: hidden files and folders ignored: 1 (first .x.png)",
        "images ignored that are in no class folder: 1 (first loose.png)",
    ]
    (tmp_path / "classnames.txt").write_text("tench | Tinca tinca\n| x\n")
    with pytest.raises(InputError, match=r"classnames\.txt:2: expected a name on each side of \|"):
        read_class_names(tmp_path / "classnames.txt")


def written(path: Path, members: list[tarfile.TarInfo | tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            entry = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            content = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_members_are_named_by_their_headers_however_long_the_name(tmp_path: Path) -> None:
    names = ["a.jpg", f"{'deep/' * 40}x.y.JPG", "ünï/日本.png"]
    tar = written(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    members = list(tar_members(tar))
    assert [member_name(tar, member.header) for member in members] == names == [member.name for member in members]
    assert [tar.read_bytes()[m.offset : m.offset + m.size].decode() for m in members] == names
    assert [(m.key, m.extension) for m in members][1:] == [(f"{'deep/' * 40}x", "y.jpg"), ("ünï/日本", "png")]


def test_members_that_cannot_be_read_are_faulty_and_twice_the_same_is_refused(tmp_path: Path) -> None:
    negative, sparse = tarfile.TarInfo("n.png"), tarfile.TarInfo("s.png")
    negative.pax_headers = {"size": "-512"}
    sparse.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,0",
        "GNU.sparse.size": "99",
    }
    tar = written(tmp_path / "a.tar", [("a.png", b"x"), negative, sparse, ("b.png", b"x")])
    assert {m.name: m.fault for m in tar_members(tar) if m.fault} == {
        "n.png": "a negative size",
        "s.png": "a sparse file",
    }
    with pytest.raises(InputError, match=r"a\.tar: n\.png: expected a plain file, found a negative size"):
        list(visible_samples(tar))
    twice = written(tmp_path / "b.tar", [("a.png", b"x"), ("__MACOSX/a.png", b"x"), ("a.png", b"y")])
    with pytest.raises(InputError, match=r"b\.tar: a: expected one member \.png, found two"):
        list(visible_samples(twice))
    endless = tarfile.TarInfo("n.png")
    endless.pax_headers = {"size": "-1536"}
    with pytest.raises(InputError, match=r"c\.tar: .* a negative size leads back to an earlier member"):
        list(tar_members(written(tmp_path / "c.tar", [("a.png", b"x"), endless])))


def test_what_follows_a_damaged_header_is_not_lost_silently(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.tar", [("a.png", b"x"), ("b.png", b"x")])
    content = bytearray(whole.read_bytes())
    assert len(list(tar_members(whole))) == 2
    (tmp_path / "twice.tar").write_bytes(content + content)
    with pytest.raises(InputError, match=r"twice\.tar: .* more data after the end of the archive"):
        list(tar_members(tmp_path / "twice.tar"))
    content[1024 + 148] ^= 1
    (tmp_path / "damaged.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged\.tar: .* a damaged header at or after byte 1024"):
        list(tar_members(tmp_path / "damaged.tar"))
