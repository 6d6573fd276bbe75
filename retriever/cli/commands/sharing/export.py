"""`retriever export`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from index.progress import Reporter
from retriever.cli.commands.common import Switch, answer
from retriever.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export a model to ONNX or OpenVINO, or a model of images and texts in the form of open_clip or of CLIP.

    The embeddings of ONNX and OpenVINO files are compared with those of the model.
    """

    model: str
    """Model folder or hub name, which may end in @revision."""
    out: Path
    """Folder to write. onnx, openvino: a file for each tower (one if they are the same), export.json, and the
    tokenizer."""
    format: Literal["onnx", "openvino", "open_clip", "clip"] = "onnx"
    """onnx: for ONNX Runtime and other engines. openvino: for OpenVINO on Intel's processors. open_clip: a checkpoint
    of open_clip, which loads it as local-dir:OUT. clip: a CLIPModel of transformers."""
    logit_scale: float | None = None
    """1 / temperature that is stored in open_clip's and CLIP's form. None: 100."""
    json: Switch = False
    """Print the result as JSON."""

    def run(self, reporter: Reporter) -> int:
        from retriever.encoding.model import load
        from retriever.sharing.export import export
        from retriever.sharing.export_clip import export_clip

        if self.format == "open_clip" or self.format == "clip":
            model = load(self.model, device="cpu", precision="fp32", progress=reporter)
            scale = 100.0 if self.logit_scale is None else self.logit_scale
            form: Literal["open_clip", "transformers"] = "open_clip" if self.format == "open_clip" else "transformers"
            folder = export_clip(model, self.out, form=form, logit_scale=scale, progress=reporter)
            answer(self.json, {"folder": str(folder), "format": self.format})
            return 0
        if self.logit_scale is not None:
            raise ArgumentError("logit_scale", f"expected none with format {self.format}, found {self.logit_scale:g}")
        model = load(self.model, device="cpu", precision="fp32", progress=reporter)
        exported = export(model, self.out, format=self.format, progress=reporter)
        if self.json:
            print(json.dumps({**dataclasses.asdict(exported), "folder": str(exported.folder)}))
            return 0
        for name, tower in exported.towers.items():
            print(f"{name}  {exported.folder / tower.file}  largest difference {tower.difference:.1e}")
        return 0
