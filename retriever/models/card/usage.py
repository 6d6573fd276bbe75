"""Examples of a model card: how to use the model in three libraries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retriever.models.loading.text_settings import SIDES, expansion_of, has_router, pools_prompts
from retriever.models.tokenizer import FixedLengthTokenizer

FOLDER = "path/to/this/folder"
"""Stands for the location of the model in a card. A push replaces it by the name of the repository."""

_TEXTS = """\
queries = ["how tall is the eiffel tower"]
passages = ["The Eiffel Tower is 330 meters tall.", "Paris is the capital of France."]
"""
_SENTENCE_TRANSFORMERS = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")
{texts}print(model.similarity(model.encode_query(queries), model.encode_document(passages)))
"""
_SENTENCE_TRANSFORMERS_IMAGES = """\
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")
images = [Image.new("RGB", (224, 224), "red")]
print(model.similarity(model.encode(["a red square"]), model.encode(images)))
"""
_RETRIEVER = """\
import retriever

model = retriever.load("{folder}")
{texts}print(model.encode_queries(queries) @ model.encode_passages(passages).T)
"""
_RETRIEVER_IMAGES = """\
import retriever
from PIL import Image

model = retriever.load("{folder}")
images = [Image.new("RGB", (224, 224), "red")]
print(model.encode_queries(["a red square"]) @ model.encode_images(images).T)
"""
_POOLINGS = {
    "mean": "embeddings = (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)",
    "cls": "embeddings = tokens[:, 0]",
    "lasttoken": "embeddings = tokens[torch.arange(len(tokens)), mask.sum(1) - 1]",
}


@dataclass(frozen=True)
class Example:
    """An example of a card."""

    title: str
    body: str
    """A fenced code block, or a sentence."""


def usage_examples(towers: Any) -> list[Example]:
    """Return examples for sentence-transformers, transformers and this package."""
    if towers.embeds_images:
        examples = {"sentence-transformers": _SENTENCE_TRANSFORMERS_IMAGES, "dense-retriever": _RETRIEVER_IMAGES}
        plain = ""
    else:
        examples = {"sentence-transformers": _SENTENCE_TRANSFORMERS, "dense-retriever": _RETRIEVER}
        plain = transformers_code(towers)
    shown = {name: _fenced(code.format(folder=FOLDER, texts=_TEXTS)) for name, code in examples.items()}
    shown["transformers"] = (
        _fenced(plain)
        if plain
        else "The model has several modules behind or beside the encoder. Use sentence-transformers, which runs them."
    )
    return [
        Example(f"With {name}", shown[name]) for name in ("sentence-transformers", "transformers", "dense-retriever")
    ]


def describe_towers(towers: Any) -> dict[str, Any]:
    """Return facts about the towers for a card: architecture, dimension, lengths, prompts, similarity."""
    encoders = list(dict.fromkeys(type(module.auto_model).__name__ for module in towers.transformers))
    facts: dict[str, Any] = {
        "Encoder": ", ".join(encoders),
        "Towers": "images and texts" if towers.embeds_images else _sides(towers),
        "Weights": sum(weight.numel() for weight in towers.parameters()),
        "Embedding dimension": towers.dimension,
        "Similarity": towers.model.similarity_fn_name,
    }
    for side, name in zip(SIDES, ("query", "passage"), strict=True):
        facts[f"Maximum length of a {name}"] = f"{towers.tokenizer(side).max_length or 'unlimited'} tokens"
        facts[f"Prompt of a {name}"] = f"`{towers.prompt(side)}`" if towers.prompt(side) else "none"
    return facts


def transformers_code(towers: Any) -> str:
    """Return code that embeds texts with transformers alone; "" if that takes more than a few lines."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    modules = list(towers.model)
    if has_router(towers.model) or not pools_prompts(towers.model) or not isinstance(modules[0], Transformer):
        return ""
    transformer, rest = modules[0], modules[1:]
    tokenizers = [towers.tokenizer(side) for side in SIDES]
    if (
        transformer.processing_kwargs
        or transformer.do_lower_case
        or expansion_of(transformer) is not None
        or tokenizers[0].max_length != tokenizers[1].max_length
        or any(isinstance(tokenizer, FixedLengthTokenizer) for tokenizer in tokenizers)
    ):
        return ""
    pooling = rest.pop(0) if rest and isinstance(rest[0], Pooling) else None
    mode = pooling.pooling_mode if pooling is not None else None
    if (
        not isinstance(mode, str)
        or mode not in _POOLINGS
        or (rest and (len(rest) > 1 or not isinstance(rest[0], Normalize)))
    ):
        return ""
    length = tokenizers[0].max_length
    truncation = "" if length is None else f"truncation=True, max_length={length}, "
    lines = [
        "import torch",
        "from transformers import AutoModel, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{FOLDER}")',
        f'encoder = AutoModel.from_pretrained("{FOLDER}").eval()',
        "",
        "def embed(texts):",
        f'    inputs = tokenizer(texts, padding=True, {truncation}return_tensors="pt")',
        "    with torch.no_grad():",
        "        tokens = encoder(**inputs).last_hidden_state",
        '    mask = inputs["attention_mask"]',
        f"    {_POOLINGS[mode]}",
        f"    return {'torch.nn.functional.normalize(embeddings, dim=1)' if rest else 'embeddings'}",
        "",
        *_TEXTS.splitlines(),
        f"print(embed({_prompted(towers, 'query', 'queries')}) @ embed({_prompted(towers, 'document', 'passages')}).T)",
    ]
    return "\n".join(lines) + "\n"


def _prompted(towers: Any, side: Any, name: str) -> str:
    prompt = towers.prompt(side)
    return f"[{prompt!r} + text for text in {name}]" if prompt else name


def _sides(towers: Any) -> str:
    return "one, shared by queries and passages" if towers.shared else "two, one for queries and one for passages"


def _fenced(code: str) -> str:
    return f"```python\n{code}```"
