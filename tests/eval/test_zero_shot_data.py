"""Image sets are read equally from all layouts, and invalid sets are reported with file and line."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from zero_shot_sets import (
    COLORS,
    embed_images,
    embed_texts,
    image_bytes,
    write_folder,
    write_table,
    write_tar,
    write_webdataset,
)

from eval.zero_shot.classification import Classification, class_vectors
from eval.zero_shot.data import ZeroShotSet, with_prompts
from eval.zero_shot.evaluate import Evaluated, embed_set, score
from eval.zero_shot.opening import open_set
from eval.zero_shot.retrieval import Retrieval
from eval.zero_shot.tables import Columns
from index.files import InputError


def evaluated(dataset: ZeroShotSet, store: Path, embed=embed_images) -> Evaluated:
    images = embed_set(dataset, embed, store, dim=3, model={"sha256": "m"}, source={"data": dataset.sha256()})
    return score(dataset, images, embed_texts, sha256=dataset.sha256())


def test_three_layouts_of_the_same_images_score_alike(tmp_path: Path) -> None:
    folder, packed = write_folder(tmp_path / "folder"), write_webdataset(tmp_path / "packed")
    names = sorted(COLORS)
    rows = [{"image": f"folder/{name}/{n}.png", "label": name} for name in names for n in range(3)]
    table = write_table(tmp_path / "table.jsonl", rows)
    for number, path in enumerate((folder, packed, table)):
        dataset = open_set(path)
        assert sorted(dataset.classes) == names
        result = evaluated(dataset, tmp_path / f"store{number}").result
        assert isinstance(result, Classification)
        assert result.measures["acc1"] == 1.0
        assert [row.images for row in result.per_class] == [3, 3, 3, 3]


def test_split_folders_and_description_files_are_found(tmp_path: Path) -> None:
    write_folder(tmp_path / "set" / "test")
    (tmp_path / "set" / "classnames.txt").write_text("blue one\ngreen one\ngrey one\nred one\n")
    (tmp_path / "set" / "zeroshot_classification_templates.txt").write_text("the {c}\n")
    dataset = open_set(tmp_path / "set")
    assert dataset.classes[0] == "blue one"
    assert (dataset.templates, dataset.own_templates) == (("the {c}",), True)
    assert dataset.samples[0].image.name == "blue/0.png"
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (tmp_path / "set" / name).rename(tmp_path / "set" / "test" / name)
    within = open_set(tmp_path / "set")
    assert (within.classes, within.templates) == (dataset.classes, dataset.templates)


def test_a_set_without_templates_gets_the_default_ones(tmp_path: Path) -> None:
    dataset = open_set(write_folder(tmp_path / "set"))
    assert not dataset.own_templates
    assert len(dataset.templates) > 1
    assert all("{c}" in template for template in dataset.templates)


@pytest.mark.parametrize("kind", ["multilabel", "retrieval"])
def test_webdatasets_of_other_types(kind: str, tmp_path: Path) -> None:
    result = evaluated(open_set(write_webdataset(tmp_path / "set", kind)), tmp_path / "store").result
    if kind == "multilabel":
        assert isinstance(result, Classification)
        assert result.measures == {"mean_average_precision": 1.0}
    else:
        assert isinstance(result, Retrieval)
        assert len(result.image_ranks) == 24
        assert result.measures["image_retrieval_recall@5"] == 1.0


def test_rows_of_the_same_image_are_merged(tmp_path: Path) -> None:
    write_folder(tmp_path / "set")
    rows = [
        {"image": "set/red/0.png", "captions": ["red", "a red thing"]},
        {"image": "set/blue/0.png", "captions": "blue"},
        {"image": "set/red/0.png", "captions": ["so red"]},
    ]
    dataset = open_set(write_table(tmp_path / "captions.jsonl", rows))
    assert dataset.task == "retrieval"
    assert [sample.captions for sample in dataset.samples] == [("red", "a red thing", "so red"), ("blue",)]


def test_labels_are_stripped_and_numbers_are_numbers(tmp_path: Path) -> None:
    write_folder(tmp_path / "set")
    images = [f"set/red/{n}.png" for n in range(3)]

    def opened(labels: list[str | int]) -> ZeroShotSet:
        rows = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
        return open_set(write_table(tmp_path / "set.jsonl", rows))

    assert opened(["cat ", "cat", "\tdog"]).classes == ("cat", "dog")
    assert opened([10, 2, 10]).classes == ("2", "10") == opened(["10", "2", "2"]).classes
    (tmp_path / "classnames.txt").write_text("zero\none | 1st\n2\n")
    assert [sample.labels for sample in opened([1, 0, 2]).samples] == [(1,), (0,), (2,)]
    assert [sample.labels for sample in opened(["1st", "2", "zero"]).samples] == [(1,), (2,), (0,)]
    named = opened(["one", "zero", "2"])
    assert named.classes == ("zero", "one", "2") and named.other_names == {1: ("1st",)}
    dataset = dataclasses.replace(named, templates=("a {c}", "{}"))
    assert dataset.prompts[1] == ["a one", "one", "a 1st", "1st"]
    assert dataset.sha256() != dataclasses.replace(dataset, other_names={}).sha256()


def test_prompts_of_each_class_come_from_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "classnames.txt").write_text("blue|azure\ngreen\ngrey\nred\n")
    dataset = open_set(write_folder(tmp_path / "set"))
    prompts = {name: [f"{name} is a color."] for name in ("azure", "green", "grey")} | {"red": ["{c} things", "fire"]}
    (tmp_path / "cupl.json").write_text(json.dumps({**prompts, "pink": ["unused"]}))
    found = with_prompts(dataset, tmp_path / "cupl.json")
    assert found.prompts == [
        ["azure is a color."],
        ["green is a color."],
        ["grey is a color."],
        ["red things", "fire"],
    ]
    seen: list[str] = []
    vectors = class_vectors(found.classes, found.prompts, lambda texts: (seen.extend(texts), embed_texts(texts))[1])
    assert seen == [text for own in found.prompts for text in own] and vectors.shape == (4, 3)
    for content, message in (("[]", "expected an object"), ('{"red": []}', "red: expected a list of prompts")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match=message):
            with_prompts(dataset, tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text(json.dumps({"red": ["x"]}))
    with pytest.raises(InputError, match=r"expected prompts of the class 'blue' of set, found none"):
        with_prompts(dataset, tmp_path / "bad.json")


def test_columns_are_chosen_and_images_may_be_in_the_table(tmp_path: Path) -> None:
    write_folder(tmp_path / "set")
    rows = [
        {"filepath": "set/red/0.png", "title": "red", "label": 3},
        {"filepath": "set/blue/0.png", "title": "blue", "label": 0},
    ]
    table = write_table(tmp_path / "clip.jsonl", rows)
    assert open_set(table, columns=Columns(caption="title")).samples[1].captions == ("blue",)
    assert open_set(table, columns=Columns(label="title")).classes == ("blue", "red")
    with pytest.raises(InputError, match=r"clip\.jsonl:1: expected a column 'alt', found filepath, title, label"):
        open_set(table, columns=Columns(caption="alt"))
    # The same images as structs of bytes, with the names of the classes in Hugging Face's features.
    names = sorted(COLORS)
    cells = [{"bytes": (tmp_path / row["filepath"]).read_bytes(), "path": None} for row in rows]
    features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    schema = pyarrow.schema(
        [
            ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
            ("label", pyarrow.int64()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    stored = pyarrow.table({"image": [*cells, {"bytes": None, "path": None}], "label": [3, 0, 1]}, schema=schema)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(stored, tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", row_group_size=2)
    dataset = open_set(tmp_path / "hub")
    assert (
        dataset.name == "hub"
        and dataset.classes == tuple(names)
        and [s.labels for s in dataset.samples] == [(3,), (0,), (1,)]
    )
    found = evaluated(dataset, tmp_path / "store")
    assert isinstance(found.result, Classification) and found.result.measures["acc1"] == 1.0
    assert list(found.images.broken) == ["test-00000-of-00001.parquet: row 3"]
    with pytest.raises(InputError, match=r"hub: expected Parquet files of the split 'val', found test-00000"):
        open_set(tmp_path / "hub", "val")


def test_lists_of_labels_make_the_task_multilabel(tmp_path: Path) -> None:
    write_folder(tmp_path / "set")
    rows = [{"image": "set/red/0.png", "labels": ["red", "warm"]}, {"image": "set/blue/0.png", "labels": []}]
    dataset = open_set(write_table(tmp_path / "set.jsonl", rows))
    assert dataset.task == "multilabel"
    assert [sample.labels for sample in dataset.samples] == [(0, 1), ()]


def test_broken_images_are_named_and_left_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    (folder / "red" / "1.png").write_bytes(image_bytes((1, 2, 3))[:40])
    (folder / "blue" / "x.jpg").write_bytes(b"not an image")
    found = evaluated(open_set(folder), tmp_path / "store")
    assert list(found.images.broken) == ["blue/x.jpg", "red/1.png"]
    assert len(found.images.samples) == len(found.images.vectors) == 11
    assert isinstance(found.result, Classification)
    assert found.result.measures["acc1"] == 1.0


def test_a_set_of_broken_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set" / "red").mkdir(parents=True)
    (tmp_path / "set" / "red" / "a.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"found none that can be read; the first, red/a\.png"):
        evaluated(open_set(tmp_path / "set"), tmp_path / "store")


def test_an_interrupted_run_resumes_with_equal_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.zero_shot.evaluate.SHARD_ROWS", 4)
    monkeypatch.setattr("eval.zero_shot.evaluate.IMAGE_BATCH", 2)
    folder = write_folder(tmp_path / "set")
    (folder / "blue" / "1.png").write_bytes(b"not an image")
    dataset = open_set(folder)
    seen: list[str] = []

    def embed(images, most: int = 10**9):
        if len(seen) + len(images) > most:
            raise KeyboardInterrupt
        seen.extend(image.name for image in images)
        return embed_images(images)

    with pytest.raises(KeyboardInterrupt):
        evaluated(dataset, tmp_path / "store", lambda images: embed(images, most=6))
    seen.clear()
    resumed = evaluated(dataset, tmp_path / "store", embed)
    assert seen == [sample.image.name for sample in dataset.samples[4:]]
    whole = evaluated(dataset, tmp_path / "whole")
    assert np.array_equal(resumed.images.vectors, whole.images.vectors)
    assert resumed.images.broken == whole.images.broken
    seen.clear()
    evaluated(dataset, tmp_path / "store", embed)
    assert seen == []


def test_the_hash_depends_on_the_image_content(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    before = open_set(folder).sha256()
    assert open_set(folder).sha256() == before
    (folder / "red" / "0.png").write_bytes(image_bytes((1, 2, 3)))
    assert open_set(folder).sha256() != before


def broken_sets(root: Path) -> dict[str, tuple[Path, str]]:
    """Kind of error -> (the set, pattern of the message)."""
    cases: dict[str, tuple[Path, str]] = {"nothing there": (root / "none", r"none: no such file or folder")}
    (root / "empty").mkdir()
    cases["empty folder"] = (root / "empty", r"empty: expected \.tar files, or a folder of images for each class")
    (root / "bare" / "cat").mkdir(parents=True)
    cases["class without images"] = (root / "bare", r"cat: expected images \(\.jpg")

    wrong = write_folder(root / "names")
    (wrong / "classnames.txt").write_text("one\ntwo\n")
    cases["class names"] = (wrong, r"classnames\.txt: expected a line for each of 4 folders, found 2")
    prompts = write_folder(root / "prompts")
    (prompts / "zeroshot_classification_templates.txt").write_text("a {c}\na cat\n")
    cases["prompt"] = (prompts, r"templates\.txt:2: expected a prompt with \{c\} in it, found 'a cat'")

    def packed(name: str, members: dict[str, bytes | str] | None = None, **files: str) -> Path:
        folder = write_webdataset(root / name)
        if members is not None:
            write_tar(folder / "test" / "0.tar", members)
        for file, text in files.items():
            (folder / file.replace("__", "/")).with_suffix(".txt").write_text(text)
        return folder

    image = image_bytes((1, 2, 3))
    cases["label"] = (packed("label", {"a.png": image, "a.cls": "9"}), r"0\.tar: a\.cls: expected a number from 0 to 3")
    cases["no label"] = (packed("lost", {"a.png": image, "a.json": "{}"}), r"a: expected a member \.cls, found \.png, ")
    cases["no image"] = (
        packed("blind", {"a.svg": image, "a.cls": "1"}),
        r"expected a member \.jpg, \.jpeg, .* found \.svg, \.cls",
    )
    cases["shards"] = (packed("shards", test__nshards="3"), r"2\.tar: no such file; expected 3 tars")
    cases["count"] = (packed("count", test__nshards="two"), r"nshards\.txt:1: expected the number of tars, found 'two'")
    cases["type"] = (packed("type", dataset_type="poetry"), r"dataset_type\.txt:1: expected classification, multi")
    cases["a tar"] = (
        packed("tar") / "test" / "0.tar",
        r"0\.tar: expected the folder of a set, found tars; give .*/tar$",
    )
    cases["tars"] = (root / "tars" / "{0..9}.tar", r"9\}\.tar: expected the folder of a set, found tars; give .*/tars$")
    captioned = packed("captioned")
    (captioned / "classnames.txt").unlink()
    cases["no classes"] = (captioned, r"classnames\.txt: no such file; .* dataset_type\.txt with the word retrieval")
    texts = root / "beir"
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (texts / name).parent.mkdir(parents=True, exist_ok=True)
        (texts / name).touch()
    cases["texts"] = (
        texts,
        r"beir: expected a set of images \(a folder for each class, .*, found a BEIR folder of tex",
    )
    cases["gap"] = (packed("gap", classnames="a\n\nb\n"), r"classnames\.txt:2: expected text, found an empty line")
    cut = packed("cut")
    (cut / "test" / "1.tar").write_bytes((cut / "test" / "1.tar").read_bytes()[:700])
    cases["cut short"] = (cut, r"1\.tar: expected an uncompressed tar, found one that cannot be read")
    vector = write_webdataset(root / "vector", "multilabel")
    write_tar(vector / "test" / "1.tar", {"a.png": image, "a.npy": b"no array"})
    cases["no array"] = (vector, r"1\.tar: a\.npy: expected an array in npy format")
    archive = io.BytesIO()
    np.savez(archive, np.zeros(4))
    several = write_webdataset(root / "several", "multilabel")
    write_tar(several / "test" / "1.tar", {"a.png": image, "a.npy": archive.getvalue()})
    cases["an archive of arrays"] = (several, r"1\.tar: a\.npy: expected an array in npy format")
    other = write_webdataset(root / "other")
    (other / "test").rename(other / "val")
    cases["another split, packed"] = (other, r"other: expected a folder for the split 'test', found val")
    write_folder(root / "splits" / "train"), write_folder(root / "splits" / "val")
    cases["other splits"] = (root / "splits", r"splits: expected a folder for the split 'test', found train, val")
    named = os.fsencode(write_folder(root / "bytes") / "red") + b"/\xff.png"
    Path(os.fsdecode(named)).write_bytes(image)
    cases["name in other bytes"] = (root / "bytes", r"red/\\udcff\.png: expected a name in UTF-8")

    def table(name: str, *lines: object) -> Path:
        path = root / f"{name}.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    good = {"image": "names/red/0.png", "label": "red"}
    cases["no json"] = (table("t1", good, "{"), r"t1\.jsonl:2: expected JSON")
    cases["no column"] = (table("t2", {"image": "a.png"}), r"t2\.jsonl:1: expected a column 'label' or")
    cases["no file"] = (table("t3", good, {"image": "gone.png", "label": "red"}), r"t3\.jsonl:2: .*found no file")
    cases["wrong type"] = (table("t4", {**good, "label": 1.5}), r"t4\.jsonl:1: expected text or a list of texts")
    cases["empty label"] = (
        table("t6", good, {**good, "label": " "}),
        r"t6\.jsonl:2: expected a label .* an empty text",
    )
    both = table("t7", {**good, "caption": "a red thing"})
    cases["labels and captions"] = (both, r"t7\.jsonl:1: .* the columns 'label' and 'caption': choose one")
    out_of_range = root / "numbered" / "t8.jsonl"
    write_table(out_of_range, [{"image": "../names/red/0.png", "label": 2}])
    (root / "numbered" / "classnames.txt").write_text("a\nb\n")
    cases["number of no class"] = (out_of_range, r"t8\.jsonl:1: expected a number from 0 to 1 of .*, found '2'")
    dotted = packed("dotted", {"a.1.png": image, "a.1.cls": "1"})
    cases["dots in names"] = (dotted, r"a: expected a member \.jpg, .*; a name has a dot before its extension")
    cases["empty table"] = (table("t5"), r"t5\.jsonl: expected images, found none")
    return cases


def test_invalid_sets_are_one_line_errors_with_their_location(tmp_path: Path) -> None:
    for what, (path, message) in broken_sets(tmp_path).items():
        with pytest.raises(InputError, match=message) as caught:
            open_set(path)
        assert "\n" not in str(caught.value), what
