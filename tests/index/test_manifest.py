from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from index import manifest as manifests
from index.files import InputError
from index.manifest import EMBEDDINGS, INDEX, FileEntry, Manifest, read_manifest, verify_files, write_manifest


def write_example(folder: Path, fields: dict | None = None, format: str = INDEX) -> Manifest:
    (folder / "a.bin").write_bytes(b"0123456789")
    (folder / "b.bin").write_bytes(b"")
    files = {name: FileEntry.of(folder / name) for name in ("a.bin", "b.bin")}
    written = Manifest(folder, format, fields if fields is not None else {"rows": 3, "ü": [1.5, None, "é"]}, files)
    write_manifest(written)
    return written


def rewrite(folder: Path, change: dict) -> None:
    """Change fields of the manifest and update its sha256."""
    value = json.loads((folder / manifests.NAME).read_text())
    value.update(change)
    value.pop("sha256")
    checksum = hashlib.sha256(json.dumps(value, indent=2, ensure_ascii=False).encode()).hexdigest()
    text = json.dumps({**value, "sha256": checksum}, indent=2, ensure_ascii=False)
    (folder / manifests.NAME).write_text(text + "\n")


def test_manifest_round_trip(tmp_path: Path) -> None:
    written = write_example(tmp_path)
    assert read_manifest(tmp_path, INDEX) == written
    assert read_manifest(tmp_path) == written
    verify_files(written, "hash")


def test_the_file_has_the_documented_shape(tmp_path: Path) -> None:
    write_example(tmp_path)
    value = json.loads((tmp_path / "manifest.json").read_text())
    assert (value["format"], value["version"]) == ("index", 1)
    assert value["files"]["a.bin"]["bytes"] == 10
    assert value["files"]["a.bin"]["sha256"].startswith("84d89877f0d4041e")


def test_any_flipped_byte_of_the_manifest_is_detected(tmp_path: Path) -> None:
    write_example(tmp_path)
    path = tmp_path / "manifest.json"
    data = path.read_bytes()
    for place in range(len(data)):
        for mask in (0x01, 0x20):
            damaged = bytearray(data)
            damaged[place] ^= mask
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=r"manifest\.json: "):
                read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\0b", "manifest.json"], ids=repr
)
def test_a_path_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_example(tmp_path)
    rewrite(tmp_path, {"files": {name: {"bytes": 1, "sha256": "00"}}})
    with pytest.raises(InputError, match=r"manifest\.json: expected names of files in this folder, found"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3},
        {"format": "cake"},
        {"version": 2},
        {"version": "1"},
        {"version": True},
        {"version": None},
        {"files": []},
        {"files": {"a.bin": 3}},
        {"files": {"a.bin": {"bytes": "10", "sha256": "00"}}},
        {"files": {"a.bin": {"bytes": True, "sha256": "00"}}},
        {"files": {"a.bin": {"bytes": 10}}},
    ],
    ids=str,
)
def test_a_forged_manifest_of_wrong_types_is_refused_in_one_line(tmp_path: Path, change: dict) -> None:
    write_example(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(InputError, match=r"manifest\.json: expected") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", "{", '{"format": NaN}', "[" * 100_000], ids=lambda t: t[:9])
def test_invalid_manifests_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json: expected") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_format_is_refused_by_name(tmp_path: Path) -> None:
    write_example(tmp_path, format=INDEX)
    with pytest.raises(InputError, match="expected an embedding store, found an index"):
        read_manifest(tmp_path, EMBEDDINGS)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"expected an index, found no manifest\.json there"):
            read_manifest(folder, INDEX)


@pytest.mark.parametrize("kind", [int, str, dict, bool])
def test_fields_are_of_their_type(tmp_path: Path, kind: type) -> None:
    values = {"number": 1, "flag": True, "text": "x", "object": {}, "nothing": None}
    holder = write_example(tmp_path, values)
    for name, value in values.items():
        if type(value) is kind:
            assert holder.field(name, kind) == value
        else:
            with pytest.raises(InputError, match=rf"manifest\.json: expected {kind.__name__} in '{name}'"):
                holder.field(name, kind)
    with pytest.raises(InputError, match="in 'missing', found None"):
        holder.field("missing", kind)


def test_counts_and_objects_of_texts_are_checked(tmp_path: Path) -> None:
    holder = write_example(tmp_path, {"rows": -1, "model": {"sha256": 3}})
    with pytest.raises(InputError, match="0 or more in 'rows', found -1"):
        holder.count("rows")
    with pytest.raises(InputError, match="an object of texts in 'model'"):
        holder.texts("model")


def test_verify_files_names_damaged_files_at_each_level(tmp_path: Path) -> None:
    holder = write_example(tmp_path)
    path = tmp_path / "a.bin"
    path.write_bytes(b"0123456780")
    verify_files(holder, "size")
    with pytest.raises(InputError, match=r"a\.bin: damaged: expected sha256 84d89877f0d4…, found"):
        verify_files(holder, "hash")
    path.write_bytes(b"012345678")
    with pytest.raises(InputError, match=r"a\.bin: damaged: expected 10 bytes, found 9"):
        verify_files(holder, "size")
    path.unlink()
    with pytest.raises(InputError, match=r"a\.bin: missing: expected a file of 10 bytes"):
        verify_files(holder, "size")


def test_an_unknown_level_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="level: expected 'size' or 'hash', found 'all'"):
        verify_files(write_example(tmp_path), "all")  # type: ignore[arg-type]
