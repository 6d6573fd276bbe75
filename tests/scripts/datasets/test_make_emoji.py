"""The bundled emoji have the checksums of their README, no concept in two splits, and unpack reproducibly."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from eval.zero_shot.opening import open_set
from index.files import sha256_file
from scripts import DATA
from scripts.datasets import emoji_sets, make_emoji

BUNDLED = DATA / "emoji"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emoji") / "data"
    assert make_emoji.main(["unpack", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("woman running facing right", "running"),
        ("person running", "running"),
        ("men with bunny ears", "with bunny ears"),
        ("family: man, woman, girl, boy", "family"),
        ("couple with heart: woman, man", "couple with heart"),
        ("man", "man"),
        ("woman’s hat", "s hat"),
        ("flag: Isle of Man", "flag isle of"),
        ("mango", "mango"),
    ],
)
def test_concepts_do_not_depend_on_the_person(name: str, concept: str) -> None:
    assert make_emoji.concept_of(name) == concept


def test_bundled_files_have_the_checksums_of_their_readme() -> None:
    readme = (BUNDLED / "README.md").read_text()
    sums = {name: sha256 for sha256, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", readme, re.MULTILINE)}
    for artist in ("google", "twitter"):
        assert sha256_file(BUNDLED / f"{artist}.webp") == sums[f"{artist}.webp"]
    emoji = emoji_sets.read_emoji(BUNDLED)
    content = emoji_sets.names_file(emoji)
    assert gzip.decompress(content) == gzip.decompress((BUNDLED / "emoji.jsonl.gz").read_bytes())
    assert len(emoji) == len({one.key for one in emoji}) == 1911
    assert readme == make_emoji.readme_of(BUNDLED, emoji)
    assert "CC" in (BUNDLED / "LICENSE").read_text() or "Creative" in (BUNDLED / "LICENSE").read_text()


def test_no_concept_is_in_two_splits() -> None:
    emoji = emoji_sets.read_emoji(BUNDLED)
    splits: dict[str, set[str]] = {}
    for one in emoji:
        assert (one.concept, one.split) == (make_emoji.concept_of(one.name), make_emoji.split_of(one.concept))
        splits.setdefault(one.split, set()).add(one.concept)
    assert not splits["train"] & splits["test"]
    assert not splits["dev"] & (splits["train"] | splits["test"])


def test_training_set_has_one_artist_and_only_train_concepts(unpacked: Path) -> None:
    train = {one.key for one in emoji_sets.read_emoji(BUNDLED) if one.split == "train"}
    with tarfile.open(unpacked / "train" / "00000.tar") as tar:
        members = {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]
    assert {name.rpartition(".")[0] for name in members} == train
    key = sorted(train)[7]
    about = json.loads(members[f"{key}.json"])
    assert members[f"{key}.txt"].decode() == about["captions"][0] == about["name"]
    assert members[f"{key}.png"] == (unpacked / "images" / "google" / f"{key}.png").read_bytes()
    assert Image.open(io.BytesIO(members[f"{key}.png"])).size == (64, 64)


def test_every_set_has_the_documented_content(unpacked: Path) -> None:
    emoji = {one.key: one for one in emoji_sets.read_emoji(BUNDLED)}
    for name, (_, split, task) in emoji_sets.SETS.items():
        dataset = open_set(unpacked / name)
        assert dataset.task == task
        assert len(dataset.samples) == sum(one.split == split for one in emoji.values())
        for sample in dataset.samples:
            one = emoji[Path(sample.image.name).stem]
            if task == "retrieval":
                assert sample.captions == one.captions
            else:
                assert dataset.classes[sample.labels[0]] == one.class_name


def test_every_image_has_its_name_in_the_corpus(unpacked: Path) -> None:
    rows = [json.loads(line) for line in (unpacked / "names.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["_id"] for row in rows] == [one.key for one in emoji_sets.read_emoji(BUNDLED)]
    for artist in emoji_sets.ARTISTS:
        assert {row["_id"] for row in rows} == {file.stem for file in (unpacked / "images" / artist).iterdir()}
    assert {"_id": "1f41f-fish", "text": "fish: animal, dinner, fishes, fishing, pisces, zodiac"} in rows


def test_unpacking_again_gives_the_same_bytes(unpacked: Path, tmp_path: Path) -> None:
    assert make_emoji.main(["unpack", "--out", str(tmp_path / "again")]) == 0
    for name in ("train/00000.tar", "held-out/test/0.tar", "held-out-subgroups/test/0.tar"):
        assert sha256_file(tmp_path / "again" / name) == sha256_file(unpacked / name)


def test_other_files_and_other_packages_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert make_emoji.main(["unpack", "--out", str(tmp_path / "mine")]) == 1
    assert "expected a new folder or one that this script wrote" in capsys.readouterr().err
    (tmp_path / "emoji.json").write_text("[]")
    folders = [word for name in make_emoji.PACKAGES for word in (f"--{name}", str(tmp_path))]
    assert make_emoji.main(["build", *folders, "--out", str(tmp_path / "new")]) == 1
    assert "expected that of emoji-datasource-google 16.0.0" in capsys.readouterr().err
