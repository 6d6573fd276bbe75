"""Exported models embed what the model embeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import World, assert_refused, command

import retriever
from index.files import InputError
from retriever.sharing import export as module
from retriever.sharing.export import EXPORT_FILE, OUTPUT, export

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def embed(folder: Path, side: str, texts: list[str]) -> np.ndarray:
    """Embed texts with the files of an export alone, as an application would."""
    from transformers import AutoTokenizer

    tower = json.loads((folder / EXPORT_FILE).read_text())["towers"][side]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    prompted = [tower["prompt"] + text for text in texts]
    tokens = tokenizer(prompted, padding=True, truncation=True, max_length=tower["max_length"], return_tensors="np")
    session = onnxruntime.InferenceSession(str(folder / tower["file"]))
    return session.run([OUTPUT], {name: tokens[name] for name in tower["inputs"]})[0]


def test_an_exported_model_embeds_what_the_model_embeds(world: World, tmp_path: Path) -> None:
    outcome = command("export", "--model", world.model, "--out", tmp_path / "onnx", "--json")
    assert outcome.code == 0, outcome.err
    towers = json.loads(outcome.out)["towers"]
    assert towers["query"]["file"] == towers["passage"]["file"] == "model.onnx"
    assert towers["query"]["difference"] < 1e-5
    model = retriever.load(world.model)
    # Other numbers of texts and tokens than those that the exporter saw.
    for texts in (["what is a cat?"], ["a", "define oak " * 9, "b c", "d", "e" * 90] * 4):
        np.testing.assert_allclose(embed(tmp_path / "onnx", "query", texts), model.encode_queries(texts), atol=1e-5)
        np.testing.assert_allclose(embed(tmp_path / "onnx", "passage", texts), model.encode_passages(texts), atol=1e-5)


def test_an_export_that_differs_is_refused(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(tower: Any, path: Path) -> None:
        path.write_bytes(b"")

    monkeypatch.setattr(module, "_write_onnx", write)
    monkeypatch.setattr(module, "_runner", lambda *arguments: lambda batch: np.ones((len(batch[0]), 32), np.float32))
    model = retriever.load(world.model, device="cpu")
    with pytest.raises(InputError, match="the embeddings differ by"):
        export(model, tmp_path / "out")
    monkeypatch.setattr(module, "_runner", lambda *arguments: lambda batch: np.full((len(batch[0]), 32), np.nan))
    with pytest.raises(InputError, match="the embeddings differ by nan"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert_refused(command("export", "--model", "acme/none", "--out", tmp_path / "out"), 1, "acme/none")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_real_model_is_exported(minilm: str, tmp_path: Path, format: Any) -> None:
    pytest.importorskip(format)
    exported = export(retriever.load(minilm, device="cpu"), tmp_path / "out", format=format)
    assert exported.difference < 1e-5
