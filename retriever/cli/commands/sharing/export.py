"""`retriever export`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from index.progress import Reporter
from retriever.cli.commands.common import Switch


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a model to ONNX or OpenVINO, and compare its embeddings with those of the model."""

    model: str
    """Model folder or hub name, which may end in @revision."""
    out: Path
    """Folder to write: a file for each tower (one if they are the same), export.json, and the tokenizer."""
    format: Literal["onnx", "openvino"] = "onnx"
    """onnx: for ONNX Runtime and other engines. openvino: for OpenVINO on Intel's processors."""
    json: Switch = False
    """Print the result as JSON."""

    def run(self, reporter: Reporter) -> int:
        from retriever.encoding.model import load
        from retriever.sharing.export import export

        model = load(self.model, device="cpu", progress=reporter)
        exported = export(model, self.out, format=self.format, progress=reporter)
        if self.json:
            print(json.dumps({**dataclasses.asdict(exported), "folder": str(exported.folder)}))
            return 0
        for name, tower in exported.towers.items():
            print(f"{name}  {exported.folder / tower.file}  largest difference {tower.difference:.1e}")
        return 0
