"""Towers: text in, one embedding out. One shared tower or two, held and saved as a sentence-transformers model."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from index.files import InputError
from retriever.config import ModelConfig
from retriever.tokens import TextTokenizer
from retriever.weights import writing_weights

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Side = Literal["query", "document"]


class Towers(nn.Module):
    """The query tower and the passage tower (one and the same unless the model routes the two sides apart).

    `model` is the sentence-transformers model whose folder is what a run leaves behind, so what is trained here and
    what `SentenceTransformer(path)` computes are the same modules.
    """

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.model = model
        for side in ("query", "document"):
            if self.prompt(side) and not all(getattr(m, "include_prompt", True) for m in model.modules()):
                raise InputError("a model whose pooling leaves out its prompt is not supported: clear its prompts")

    @property
    def shared(self) -> bool:
        """Whether one tower serves both sides."""
        return type(self.model[0]).__name__ != "Router"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        dimension = self.model.get_embedding_dimension()
        assert dimension is not None
        return dimension

    def prompt(self, side: Side) -> str:
        """The text that the model puts before every query or passage; empty for none."""
        # The names that sentence-transformers' encode_query and encode_document try, in their order.
        names = ("query",) if side == "query" else ("document", "passage", "corpus")
        return next((prompt for name in names if (prompt := self.model.prompts.get(name))), "")

    def tokenizer(self, side: Side) -> TextTokenizer:
        """What makes token ids of that side's texts."""
        tower = self._tower(side)
        return TextTokenizer(tower.tokenizer, tower.max_seq_length)

    def forward(self, features: dict[str, Tensor], side: Side) -> Tensor:
        """Embeddings [batch, dimension] in fp32 (in the weights' dtype outside autocast)."""
        # A copy: sentence-transformers' modules write their results into the dictionary they are given.
        output = self.model(dict(features), task=side)["sentence_embedding"]
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output

    def fingerprint(self) -> dict[str, str]:
        """What identifies the vectors: a sha256 over weights, tokenizer, module settings, lengths and prompts."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        for side in ("query", "document"):
            texts = self.tokenizer(side)
            digest.update(f"{self.prompt(side)!r} {texts.max_length} {texts.settings()}\n".encode())
        # The printed form holds every module with its settings: pooling mode, projection, normalisation.
        digest.update(repr(self.model).encode())
        return {"sha256": digest.hexdigest()}

    def save(self, folder: Path) -> None:
        """Write a sentence-transformers model folder (safetensors) into an existing folder."""
        with writing_weights(folder):
            self.model.save(str(folder), create_model_card=False, safe_serialization=True)

    def _tower(self, side: Side) -> Any:
        """The sentence-transformers Transformer module (tokenizer, longest length) of a side."""
        first: Any = self.model[0]
        return first if self.shared else first.sub_modules[side][0]


def load_towers(path: str, device: torch.device | str = "cpu") -> Towers:
    """Load a model folder or hub name as it is, for encoding, in evaluation mode and fp32."""
    return Towers(_load_model(path)).to(device).eval()


def build_towers(config: ModelConfig) -> Towers:
    """Make the towers of a training run, on the CPU, in training mode and fp32.

    Raises:
        InputError: there is no such model, it has no tokenizer, or the configuration cannot be met.
    """
    if bool(config.name) == bool(config.architecture):
        raise InputError("model: expected either model.name (folder or hub name) or model.architecture (from scratch)")
    if config.architecture:
        with tempfile.TemporaryDirectory() as folder:
            _write_new_encoder(config, Path(folder))
            model = _load_model(folder, pooling=config.pooling)
    else:
        model = _load_model(config.name, pooling=config.pooling)
    model = _adapt(model, config)
    if config.max_length is not None:
        model.max_seq_length = config.max_length
    if config.dropout is not None:
        _set_dropout(model, config.dropout)
    for name, prompt in (("query", config.query_prompt), ("document", config.passage_prompt)):
        if prompt is not None:
            model.prompts[name] = prompt
    return Towers(model).train()


def _without_bars() -> None:
    """Keep transformers from drawing progress bars, which would break up the one that the commands draw."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _load_model(path: str, pooling: str | None = None) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = Path(path)
    if folder.is_dir():
        _check_folder(folder)
    elif folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise InputError(f"{path}: no such model folder")
    _without_bars()
    # fp32 whatever the file holds: training in bf16 weights loses small updates, and encoding chooses by autocast.
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    try:
        if folder.is_dir() and not (folder / "modules.json").exists():
            transformer = Transformer(path, model_kwargs=kwargs)
            width = transformer.get_embedding_dimension()
            model = SentenceTransformer(modules=[transformer, Pooling(width, pooling or "mean")], device="cpu")
        else:
            model = SentenceTransformer(path, device="cpu", model_kwargs=kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, SafetensorError) as error:
        # The loaders of transformers raise all of these for folders that are incomplete or of another kind.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        what = "cannot be loaded as a text model" if folder.is_dir() else "no such folder, and no such model on the hub"
        raise InputError(f"{path}: {what}: {reason[0]}") from error
    return model


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def _check_folder(folder: Path) -> None:
    """transformers makes an empty tokenizer of a folder without one; such a model would embed nothing but [UNK]."""
    if not (folder / "modules.json").exists() and not (folder / "config.json").exists():
        raise InputError(f"{folder}: expected a model folder with modules.json or config.json, found neither")
    if not any(next(folder.rglob(name), None) for name in _TOKENIZER_FILES):
        raise InputError(f"{folder}: the model folder has no tokenizer: expected one of {', '.join(_TOKENIZER_FILES)}")


def _write_new_encoder(config: ModelConfig, folder: Path) -> None:
    """Randomly initialised weights of `config.architecture`, with its tokenizer, as a Hugging Face folder."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    if not config.tokenizer:
        raise InputError("model.tokenizer: expected a path or hub name for a model from scratch")
    _without_bars()
    fields = dict(config.architecture or {})
    kind = fields.pop("model_type", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        fields.setdefault("vocab_size", len(tokenizer))
        model = AutoModel.from_config(AutoConfig.for_model(kind, **fields))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"model.architecture: cannot be built: {str(error).splitlines()[0]}") from error
    with writing_weights(folder):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _adapt(model: SentenceTransformer, config: ModelConfig) -> SentenceTransformer:
    """Apply pooling, projection, normalisation and separation of the towers to a loaded model."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Router
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    if type(model[0]).__name__ == "Router":
        if config.pooling or config.projection:
            raise InputError(f"{config.name}: has two towers already; pooling and projection are the folder's own")
        return model
    modules: list[Any] = list(model)
    poolings = [i for i, module in enumerate(modules) if isinstance(module, Pooling)]
    if config.pooling and poolings:
        modules[poolings[0]] = Pooling(modules[0].get_embedding_dimension(), config.pooling)
    if config.projection:
        normalized = isinstance(modules[-1], Normalize)
        modules = modules[:-1] if normalized else modules
        width = SentenceTransformer(modules=modules, device="cpu").get_embedding_dimension() or 0
        modules.append(Dense(width, config.projection, bias=False, activation_function=nn.Identity()))
    if config.normalize and not isinstance(modules[-1], Normalize):
        modules.append(Normalize())
    if not config.shared:
        modules = [Router.for_query_document(modules, copy.deepcopy(modules))]
    return SentenceTransformer(
        modules=modules,
        device="cpu",
        prompts={name: prompt or "" for name, prompt in model.prompts.items()},
        similarity_fn_name=model.similarity_fn_name,
    )


def _set_dropout(model: nn.Module, rate: float) -> None:
    """Dropout modules, and the rates that attention functions read off their modules as plain numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name, value in vars(module).items():
            if isinstance(value, float) and name.endswith("dropout"):
                setattr(module, name, rate)
