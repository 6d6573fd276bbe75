"""A zero-shot report contains measures, chance levels, excluded images and the nearest images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from zero_shot_sets import COLORS, embed_images, embed_texts, image_bytes, write_folder, write_webdataset

from eval.reports import plots
from eval.zero_shot import figures
from eval.zero_shot.classification import classify
from eval.zero_shot.evaluate import Evaluated, embed_set, score
from eval.zero_shot.opening import open_set
from eval.zero_shot.report import ZeroShotReport, confusions
from eval.zero_shot.report_files import write


def opened(content: bytes, name: str) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def evaluated(path: Path, store: Path) -> Evaluated:
    dataset = open_set(path)
    images = embed_set(dataset, embed_images, store, dim=3, model={"sha256": "m"}, source={})
    return score(dataset, images, embed_texts, sha256="d")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Evaluated]]:
    root = tmp_path_factory.mktemp("zero-shot")
    folder = write_folder(root / "<colors>")
    (folder / "blue" / "a_broken|one.jpg").write_bytes(b"not an image")
    # An image in the wrong folder, which is a classification error.
    (folder / "red" / "9.png").write_bytes(image_bytes(COLORS["green"]))
    packed = [write_webdataset(root / kind, kind) for kind in ("retrieval", "multilabel")]
    sets = [evaluated(path, root / f"store{n}") for n, path in enumerate([folder, *packed])]
    out = root / "report"
    report = ZeroShotReport("Zero-shot: <colors>", sets, {"model": "none & <nothing>", "seed": 0})
    files = write(out, report, opened)
    assert all(path.is_file() for path in files)
    return out, sets


def test_json_contains_measures_chance_classes_and_unreadable_images(written: tuple[Path, list[Evaluated]]) -> None:
    sets = json.loads((written[0] / "report.json").read_text())["sets"]
    colors = sets["<colors>"]
    assert colors["measures"] == {"acc1": 12 / 13, "mean_per_class_recall": (3 + 0.75) / 4}
    assert colors["chance"] == {"acc1": 0.25, "mean_per_class_recall": 0.25}
    assert colors["broken"] == {"blue/a_broken|one.jpg": "not an image"}
    assert colors["confusions"] == [["red", "green", 1]]
    assert {row["name"]: row["value"] for row in colors["classes"]}["red"] == 0.75
    assert sets["retrieval"]["captions"] == 24
    assert sets["multilabel"]["measures"] == {"mean_average_precision": 1.0}


def test_markdown_and_html_contain_the_same_values(written: tuple[Path, list[Evaluated]]) -> None:
    text, page = ((written[0] / name).read_text() for name in ("report.md", "report.html"))
    for said in ("0.9231", "0.2500", "acc5 is undefined under five classes", "1 images cannot be read"):
        assert said in text
        assert said in page
    assert "image retrieval median rank" in text
    assert "| red as green | 1 |" in text
    assert "![" in text and "nearest.png" in text


def test_text_from_data_is_escaped_and_nothing_external_is_loaded(written: tuple[Path, list[Evaluated]]) -> None:
    page = (written[0] / "report.html").read_text()
    assert "<colors>" not in page and "&lt;colors&gt;" in page
    assert "none &amp; &lt;nothing&gt;" in page
    assert "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count('src="data:image/png;base64,') == 4
    text = (written[0] / "report.md").read_text()
    assert "<colors>" not in text and "(%3Ccolors%3E/nearest.png)" in text


def test_the_sheet_shows_the_nearest_images_and_frames_correct_ones(
    written: tuple[Path, list[Evaluated]],
) -> None:
    colors, retrieval, _ = written[1]
    rows = figures.nearest(colors, columns=5)
    assert [row.text for row in rows] == ["blue", "green", "grey", "red"]
    green = rows[1]
    assert {image.name for image, _, _ in green.images[:4]} == {
        "green/0.png",
        "green/1.png",
        "green/2.png",
        "red/9.png",
    }
    assert {image.name: right for image, right, _ in green.images}["red/9.png"] is False
    scores = [score for _, _, score in green.images]
    assert scores == sorted(scores, reverse=True) and -1 <= scores[-1] < scores[0] <= 1.0001
    captions = figures.nearest(retrieval, rows=3)
    # Evenly spaced by the rank of the wanted image: the best, the median and the worst.
    first = np.unique(retrieval.owners, return_index=True)[1]
    ranks = np.sort(retrieval.result.image_ranks[first])
    assert [row.rank for row in captions] == ranks[[0, round((len(ranks) - 1) / 2), -1]].tolist()
    for row in captions:
        assert [number for number, (_, right, _) in enumerate(row.images, 1) if right] == [row.rank][: row.rank <= 8]
    assert all(sum(right for _, right, _ in row.images) <= 1 and row.wanted is not None for row in captions)


def test_the_sheet_holds_the_images_colors(written: tuple[Path, list[Evaluated]]) -> None:
    sheet = np.asarray(Image.open(written[0] / "<colors>" / "nearest.png").convert("RGB")).reshape(-1, 3)
    for color in COLORS.values():
        assert (np.abs(sheet.astype(int) - color).max(axis=1) <= 3).sum() > 200


@pytest.mark.parametrize("classes", [3, 40, 70])
def test_the_confusion_matrix_shows_all_classes_or_those_with_most_errors(classes: int) -> None:
    labels = np.arange(4 * classes) % classes
    chance = np.random.default_rng(0)
    vectors = np.eye(classes)
    images = vectors[labels] + chance.random((len(labels), classes))
    result = classify(images, vectors, labels.tolist(), [f"class {n}" for n in range(classes)])
    with plots.style():
        axes = figures.confusion(result).axes[0]
    drawn = axes.images[0].get_array()
    assert len(drawn) == (classes if classes <= 40 else 30)
    # Every image of a class that is shown is somewhere in its row.
    assert np.allclose(drawn.sum(axis=1), 1)


def test_errors_are_counted_most_frequent_first() -> None:
    vectors = np.eye(3)
    result = classify(vectors[[0, 1, 1, 2, 2, 2]], vectors, [0, 0, 0, 0, 1, 2], ["a", "b", "c"])
    assert confusions(result) == [("a", "b", 2), ("a", "c", 1), ("b", "c", 1)]
