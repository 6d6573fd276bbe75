"""The public function `retriever.export`, which exports a model to ONNX or OpenVINO and compares the embeddings."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from index.files import InputError, atomic_folder, sha256_file, write_json
from index.progress import Progress, Reporter, as_reporter
from retriever.encoding.model import Model, ModelInput, load
from retriever.errors import check_choice, check_paths
from retriever.models.images.towers import ImageTextTowers
from retriever.models.loading.errors import one_line
from retriever.models.loading.text_settings import SIDES
from retriever.models.modality import embeds_images
from retriever.models.tokenizer import FixedLengthTokenizer, TextTokenizer
from retriever.models.towers import Towers
from retriever.utils.versions import versions

ExportFormat = Literal["onnx", "openvino"]
EXPORT_FILE = "export.json"
"""Name of the file that describes an export."""
OUTPUT = "sentence_embedding"
# Largest allowed difference of an element of a unit vector: that of float32 sums in another order, in deep models.
TOLERANCE = 1e-4
# Weights beyond this are in a file of their own: one file may have 2 GiB.
MAX_IN_ONE_FILE = 2**30
# Batches of texts of different lengths, with which exports are checked.
TEXTS = (
    ("a cat",),
    ("How tall is the Eiffel Tower? 330 m, says “Ångström”.", "", "dense retrieval"),
    tuple(f"{word} and {'many more words ' * count}" for count, word in enumerate("abcdefg")),
    ("a very long text, which is truncated " * 100, "a short one"),
)


@dataclass(frozen=True)
class ExportedTower:
    """One exported tower.

    Attributes:
        file: Its file in the folder.
        inputs: Names of its inputs, in order; the output is "sentence_embedding".
        prompt: Text that is put before each text; "" for none.
        max_length: Number of tokens to which texts are truncated; None: no truncation.
        padded_to: Number of tokens to which all texts are padded; None: to the longest text of the batch.
        difference: Largest difference of an element of the embeddings of some inputs, scaled to unit length, from those
            of the model.
        sha256: Checksum of the file.
    """

    file: str
    inputs: tuple[str, ...]
    prompt: str
    max_length: int | None
    padded_to: int | None
    difference: float
    sha256: str


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        folder: The folder, with `export.json`, which has these facts, and the tokenizer.
        format: "onnx" or "openvino".
        towers: "query" and "passage", or "text" and "image" -> tower. Shared towers have the same file.
    """

    folder: Path
    format: str
    towers: dict[str, ExportedTower]

    @property
    def difference(self) -> float:
        """The largest difference of any tower."""
        return max(tower.difference for tower in self.towers.values())


@dataclass(frozen=True)
class _Tower:
    """A tower to export: a module of tensors, and batches with which it is traced and checked."""

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    batches: list[tuple[Tensor, ...]]
    varying: bool
    """Whether the second dimension of the inputs varies."""
    tokenizer: TextTokenizer | None
    prompt: str = ""


class _TextModule(nn.Module):
    def __init__(self, towers: Towers, side: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.towers, self.side, self.names = towers, side, names

    def forward(self, *tensors: Tensor) -> Tensor:
        embeddings: Tensor = self.towers(dict(zip(self.names, tensors, strict=True)), self.side)
        return embeddings


class _ImageModule(nn.Module):
    def __init__(self, towers: ImageTextTowers) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.towers({"pixels": pixels})
        return embeddings


def export(model: ModelInput, out: str | Path, *, format: ExportFormat = "onnx", progress: Progress = None) -> Exported:
    """Export a model to ONNX or OpenVINO, in fp32, and compare the embeddings of some inputs with the model's.

    Each file is a whole tower with pooling, projection and normalization: its output "sentence_embedding" is the
    embedding [batch, D]. Batch size and length vary. Texts are tokenized with the tokenizer in the folder `tokenizer`,
    after their prompt. Images are uint8 [batch, 3, height, width], resized and cropped, not yet normalized.

    Args:
        model: A model from `retriever.load` on the CPU in fp32, or its folder or hub name.
        out: Folder to write: `model.onnx`, or a file for each tower, and `export.json`.
        format: "onnx" (needs the extra `onnx`) or "openvino" (needs the extra `openvino`). Default: "onnx".
        progress: Called with a `ProgressEvent` at each tower. Default: None.

    Returns:
        The files, their inputs, and the measured differences.

    Raises:
        InputError: The model cannot be exported, a package is missing, or the embeddings differ by more than 1e-4.
    """
    check_choice(get_args(ExportFormat), format=format)
    check_paths(out=out)
    _check_packages(format)
    reporter, out = as_reporter(progress), Path(out)
    loaded = model if isinstance(model, Model) else load(model, device="cpu", precision="fp32", progress=reporter)
    if loaded.device.type != "cpu" or loaded.options.precision != "fp32":
        raise InputError(f"{loaded.name}: expected a model on the CPU in fp32, found {loaded.device}")
    towers = _towers_of(loaded.towers)
    with atomic_folder(out) as folder:
        exported = _export_all(towers, folder, format, reporter, loaded.name)
        loaded.towers.tokenizer("document").tokenizer.save_pretrained(folder / "tokenizer")
        facts = {
            "format": format,
            "model": loaded.name if not Path(loaded.name).is_dir() else Path(loaded.name).resolve().name,
            "fingerprint": loaded.towers.fingerprint()["sha256"],
            "dimension": loaded.dimension,
            "similarity": loaded.towers.model.similarity_fn_name,
            "towers": {name: asdict(tower) for name, tower in exported.items()},
            "versions": versions("torch", "transformers", "onnx", "onnxruntime", *(["openvino"] * (format != "onnx"))),
        }
        write_json(folder / EXPORT_FILE, facts)
    return Exported(out, format, exported)


def _check_packages(format: ExportFormat) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError('export needs onnx, onnxscript and onnxruntime: pip install "dense-retriever[onnx]"') from None
    if format == "openvino":
        try:
            import openvino  # noqa: F401
        except ImportError:
            raise InputError('format: openvino is not installed: pip install "dense-retriever[openvino]"') from None


def _towers_of(towers: Towers) -> dict[str, _Tower]:
    """Return the towers to export, by what they embed; a shared tower twice."""
    if embeds_images(towers):
        height, width = towers.transform.size
        pixels = torch.randint(
            256, (3, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        image = _Tower("image", _ImageModule(towers), ("pixels",), [(pixels,), (pixels[:1],)], False, None)
        return {"text": _text_tower("text", towers, "document"), "image": image}
    found = {name: _text_tower(name, towers, side) for name, side in zip(("query", "passage"), SIDES, strict=True)}
    first = found["query"].tokenizer
    assert first is not None
    if towers.shared and first.settings() == towers.tokenizer("document").settings():
        # One file; the prompts may differ.
        found = {name: _Tower("model", *list(vars(tower).values())[1:]) for name, tower in found.items()}
    return found


def _text_tower(name: str, towers: Towers, side: Any) -> _Tower:
    tokenizer = towers.tokenizer(side)
    batches = []
    for texts in TEXTS:
        tokens = tokenizer([towers.prompt(side) + text for text in texts])
        batches.append(tokenizer.pad(tokens, np.arange(len(texts))))
    names = tuple(batches[0])
    tensors = [tuple(batch[key] for key in names) for batch in batches]
    fixed = isinstance(tokenizer, FixedLengthTokenizer)
    return _Tower(name, _TextModule(towers, side, names), names, tensors, not fixed, tokenizer, towers.prompt(side))


def _export_all(
    towers: dict[str, _Tower], folder: Path, format: ExportFormat, reporter: Reporter, model: str
) -> dict[str, ExportedTower]:
    exported: dict[str, ExportedTower] = {}
    written: dict[str, str] = {}
    with reporter.bar(f"export to {format}", len(towers), "towers") as advance:
        for name, tower in towers.items():
            try:
                file = written.get(tower.name) or _write(tower, folder, format)
                difference = _difference(tower, _runner(folder / file, tower.inputs, format))
            # The exporters and runtimes raise whatever fails inside them.
            except Exception as error:
                raise InputError(f"{model}: cannot be exported to {format}: {one_line(error)}") from error
            if not difference <= TOLERANCE:
                raise InputError(
                    f"{model}: exported to {format}, the embeddings differ by {difference:.1e} (expected at most "
                    f"{TOLERANCE:.0e})"
                )
            written[tower.name] = file
            tokenizer = tower.tokenizer
            exported[name] = ExportedTower(
                file,
                tower.inputs,
                tower.prompt,
                None if tokenizer is None else tokenizer.max_length,
                None if tower.varying or tokenizer is None else tokenizer.max_length,
                difference,
                sha256_file(folder / file),
            )
            advance(1)
    return exported


def _write(tower: _Tower, folder: Path, format: ExportFormat) -> str:
    """Write a tower and return the name of its file."""
    if format == "onnx":
        _write_onnx(tower, folder / f"{tower.name}.onnx")
        return f"{tower.name}.onnx"
    import openvino

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "tower.onnx"
        _write_onnx(tower, path)
        openvino.save_model(openvino.convert_model(path), folder / f"{tower.name}.xml", compress_to_fp16=False)
    return f"{tower.name}.xml"


def _write_onnx(tower: _Tower, path: Path) -> None:
    dynamic: Any = torch.export.Dim.DYNAMIC
    shape = {0: dynamic, 1: dynamic} if tower.varying else {0: dynamic}
    # Traced with several rows of several tokens; sizes of 1 would become constants.
    example = max(tower.batches, key=lambda batch: len(batch[0]))
    size = sum(weight.numel() * weight.element_size() for weight in tower.module.parameters())
    module = tower.module.eval()
    several = isinstance(module, _TextModule)
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            module,
            example,
            str(path),
            input_names=list(tower.inputs),
            output_names=[OUTPUT],
            # The arguments of *tensors are one argument.
            dynamic_shapes=((shape,) * len(tower.inputs),) if several else (shape,),
            dynamo=True,
            external_data=size > MAX_IN_ONE_FILE,
            verbose=False,
        )


def _runner(path: Path, inputs: tuple[str, ...], format: ExportFormat) -> Callable[[tuple[Tensor, ...]], np.ndarray]:
    """Return a function from the inputs of a batch to its embeddings, by the runtime of the format."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda batch: session.run([OUTPUT], dict(zip(inputs, (x.numpy() for x in batch), strict=True)))[0]
    import openvino

    # Not the default on CPUs with bf16: the comparison is of the model, not of a precision.
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda batch: compiled([x.numpy() for x in batch])[0]


def _difference(tower: _Tower, run: Callable[[tuple[Tensor, ...]], np.ndarray]) -> float:
    """Return the largest difference of an element of unit vectors over all batches; NaN if one is not finite."""
    largest = 0.0
    for batch in tower.batches:
        with torch.no_grad():
            expected = tower.module(*batch)
        found = torch.from_numpy(np.ascontiguousarray(run(batch)))
        units = [nn.functional.normalize(each.double(), dim=1) for each in (expected, found)]
        difference = float((units[0] - units[1]).abs().max())
        largest = difference if not difference <= largest else largest
    return largest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context without the remarks of torch's exporter on operators that are not used, and on names of axes."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
