"""Measures equal CLIP_benchmark's within 1e-6 in every layout, and ties are counted at their chance level."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from zero_shot_sets import unit, write_table, write_tar

from eval.zero_shot.chance import chance_recall
from eval.zero_shot.evaluate import embed_set, score
from eval.zero_shot.opening import open_set
from eval.zero_shot.retrieval import retrieve

COUNT, CLASSES, DIM = 40, 7, 16
TEMPLATES = ("a photo of {c}", "{c}")
NAMES = [f"class {number}" for number in range(CLASSES)]
LABELS = (np.arange(COUNT) * 5 % CLASSES).tolist()
CAPTIONS = [[f"caption {row} of {count}" for count in range(1 + row % 3)] for row in range(COUNT)]


def vector(key: str) -> np.ndarray:
    """A random unit vector that depends on the key alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return unit(np.random.default_rng(seed).normal(size=(1, DIM)))[0]


def color(row: int) -> tuple[int, int, int]:
    return 5 * row, 255 - 5 * row, row


def png(row: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 8), color(row)).save(buffer, "PNG")
    return buffer.getvalue()


def image_vector(row: int) -> np.ndarray:
    """Near the classes and captions of the image, so that measures are neither 0 nor 1."""
    near = 0.1 * vector(NAMES[LABELS[row]]) + 0.35 * vector(CAPTIONS[row][-1])
    return unit((near + 0.8 * vector(str(color(row))))[None])[0]


def embed_images(images: Sequence[Any]) -> tuple[np.ndarray, dict[int, str]]:
    known = {color(row): image_vector(row) for row in range(COUNT)}
    opened = (Image.open(io.BytesIO(image.read())).convert("RGB") for image in images)
    return np.stack([known[image.getpixel((0, 0))] for image in opened]), {}


def embed_texts(texts: Sequence[str]) -> np.ndarray:
    return np.stack([unit((vector(t.removeprefix("a photo of ")) + 0.1 * vector(t))[None])[0] for t in texts])


def measures(path: Path, folder: Path) -> dict[str, float]:
    dataset = open_set(path)
    images = embed_set(dataset, embed_images, folder, dim=DIM, model={"sha256": "m"}, source={})
    assert len(images.samples) == COUNT
    return score(dataset, images, embed_texts, sha256="").result.measures


def columns(task: str) -> dict[str, list[Any]]:
    """The images as bytes, with labels or captions."""
    about = [NAMES[label] for label in LABELS] if task == "classification" else CAPTIONS
    return {"image": [png(row) for row in range(COUNT)], "label" if task == "classification" else "captions": about}


def folder_layout(at: Path, task: str) -> Path:
    for row, label in enumerate(LABELS):
        (at / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (at / NAMES[label] / f"{row}.png").write_bytes(png(row))
    (at / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return at


def webdataset_layout(at: Path, task: str) -> Path:
    for shard in range(2):
        members: dict[str, bytes | str] = {}
        for row in range(shard, COUNT, 2):
            members[f"s{row}.png"] = png(row)
            members[f"s{row}.{'cls' if task == 'classification' else 'txt'}"] = (
                str(LABELS[row]) if task == "classification" else "\n".join(CAPTIONS[row])
            )
        write_tar(at / "test" / f"{shard}.tar", members)
    (at / "dataset_type.txt").write_text(task)
    (at / "classnames.txt").write_text("\n".join(NAMES))
    (at / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return at


def table_layout(suffix: str) -> Callable[[Path, str], Path]:
    def write(at: Path, task: str) -> Path:
        values = columns(task)
        at.mkdir()
        for row, content in enumerate(values["image"]):
            (at / f"{row}.png").write_bytes(content)
        name = "label" if task == "classification" else "captions"
        rows = [{"image": f"{row}.png", name: value} for row, value in enumerate(values[name])]
        (at / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
        if suffix == "jsonl":
            return write_table(at / "set.jsonl", rows)
        name = "label" if task == "classification" else "caption"
        # One line for each caption.
        lines = [
            f"{row['image']}\t{text}"
            for row in rows
            for text in ([row["label"]] if task == "classification" else row["captions"])
        ]
        (at / f"set.{suffix}").write_text("\n".join([f"image\t{name}", *lines]))
        return at / f"set.{suffix}"

    return write


def parquet_layout(at: Path, task: str) -> Path:
    import pyarrow
    from pyarrow import parquet

    at.mkdir()
    values = columns(task)
    values["image"] = [{"bytes": content, "path": None} for content in values["image"]]
    table = pyarrow.table(values)
    for number in range(2):
        parquet.write_table(table.slice(number * 25, 25), at / f"test-{number}.parquet")
    (at / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return at


def huggingface_layout(at: Path, task: str) -> Path:
    datasets = pytest.importorskip("datasets")
    values = columns(task)
    values["image"] = [Image.open(io.BytesIO(content)) for content in values["image"]]
    datasets.Dataset.from_dict(values).cast_column("image", datasets.Image()).save_to_disk(at)
    (at / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return at


LAYOUTS: dict[str, Callable[[Path, str], Path]] = {
    "folder": folder_layout,
    "webdataset": webdataset_layout,
    "jsonl": table_layout("jsonl"),
    "tsv": table_layout("tsv"),
    "parquet": parquet_layout,
    "huggingface": huggingface_layout,
}


class TheirModel:
    """A model whose images are row numbers and whose tokens are numbers of texts."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        self.texts += texts
        return torch.arange(len(self.texts) - len(texts), len(self.texts))

    def encode_image(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([image_vector(row) for row in rows.tolist()]))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(embed_texts([self.texts[token] for token in tokens.tolist()]))


class Batches(list):
    """A data loader."""

    class dataset:
        classes = NAMES


def theirs_by_package(task: str) -> dict[str, float]:
    """CLIP_benchmark 1.6 itself."""
    pytest.importorskip("clip_benchmark")
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    model, rows = TheirModel(), list(torch.arange(COUNT).split(16))
    if task == "retrieval":
        batches = Batches((part, [CAPTIONS[row] for row in part.tolist()]) for part in rows)
        return zeroshot_retrieval.evaluate(model, batches, model.tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    # Their function fails with numpy 2.4, which converts no array of one element to a number.
    zeroshot_classification.accuracy = lambda output, target, topk: [
        (output.topk(k).indices == target[:, None]).sum().item() / len(target) for k in topk
    ]
    batches = Batches((part, torch.tensor(LABELS)[part]) for part in rows)
    return zeroshot_classification.evaluate(model, batches, model.tokenize, NAMES, list(TEMPLATES), "cpu", amp=False)


def theirs_by_formula(task: str) -> dict[str, float]:
    """The definitions of https://github.com/LAION-AI/CLIP_benchmark (clip_benchmark/metrics, version 1.6), on whole
    matrices: an image or text counts if one of its positives is in torch.topk of its scores."""
    images = torch.from_numpy(np.stack([image_vector(row) for row in range(COUNT)]))
    if task == "retrieval":
        owners = torch.tensor([row for row, texts in enumerate(CAPTIONS) for _ in texts])
        scores = torch.from_numpy(embed_texts([text for texts in CAPTIONS for text in texts])) @ images.T
        positive = owners[:, None] == torch.arange(COUNT)
        found = {}
        for k in (1, 5, 10):
            for name, matrix, right in (("image", scores, positive), ("text", scores.T, positive.T)):
                hit = right.gather(1, matrix.topk(k, dim=1).indices).any(dim=1)
                found[f"{name}_retrieval_recall@{k}"] = hit.float().mean().item()
        return found
    prompts = torch.from_numpy(embed_texts([each.format(c=name) for name in NAMES for each in TEMPLATES]))
    classes = torch.nn.functional.normalize(prompts.view(CLASSES, len(TEMPLATES), DIM).mean(dim=1), dim=1)
    logits, target = images @ classes.T, torch.tensor(LABELS)
    hit = logits.topk(5, dim=1).indices == target[:, None]
    recalls = [hit[target == label, :1].float().mean() for label in range(CLASSES)]
    return {
        "acc1": hit[:, :1].any(1).float().mean().item(),
        "acc5": hit.any(1).float().mean().item(),
        "mean_per_class_recall": torch.stack(recalls).mean().item(),
    }


@pytest.mark.parametrize("theirs", [theirs_by_formula, theirs_by_package])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_measures_equal_clip_benchmarks_in_every_layout(
    task: str, layout: str, theirs: Callable[[str], dict[str, float]], tmp_path: Path
) -> None:
    if (task, layout) == ("retrieval", "folder"):
        pytest.skip("folders of classes have no captions")
    expected = theirs(task)
    found = measures(LAYOUTS[layout](tmp_path / "set", task), tmp_path / "images")
    assert len(expected) == (3 if task == "classification" else 6)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert all(0.05 < value < 0.99 for value in expected.values())


@pytest.mark.parametrize("copies", [1, 4, 40])
def test_images_that_are_equal_share_their_ranks_in_data_order(copies: int) -> None:
    """Retrieval among copies of the same image, to the extreme of a model that embeds all images alike."""
    images = np.repeat(np.stack([vector(str(row)) for row in range(40 // copies)]), copies, axis=0)
    found = retrieve(images, images, np.arange(40))
    # Each caption finds the copies of its image first, in data order.
    assert found.image_ranks.tolist() == [1 + row % copies for row in range(40)]
    for k in (1, 5, 10):
        expected = min(1.0, k / copies)
        assert found.measures[f"image_retrieval_recall@{k}"] == pytest.approx(expected)
        if copies == 40:
            assert expected == pytest.approx(chance_recall({1: 40}, 40, k))
    # Nothing depends on which of the equal images is whose, in either direction.
    order = np.random.default_rng(0).permutation(40)
    shuffled = retrieve(images[order], images[order], np.arange(40))
    assert shuffled.measures == pytest.approx(found.measures)
