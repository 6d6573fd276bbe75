"""Which Hugging Face models read texts laid end to end, and how they are made to.

transformers lets a model's attention be replaced by name (its AttentionInterface); what stands before and after it
works token by token, some of it in kernels of ours. A family is known here when the tests hold its outputs against
those of the padded path.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from retriever.models.loading.folder import text_towers
from retriever.models.packed import mpnet
from retriever.models.packed.attention import Spans, spans_attention
from retriever.models.packed.pooling import MODES, pool_features
from retriever.models.packed.sublayers import fuse_sublayers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "modernbert")
DECODERS = ("llama", "mistral", "qwen2", "qwen3")
_ATTENTION = "text_spans"


def drop_padding(model: SentenceTransformer) -> bool:
    """Have a sentence-transformers model take `input_ids` and `position_ids` [1, tokens] of texts laid end to end.

    With them go the `spans` that say where each text begins and ends. From then on the model takes texts in no other
    way. Its weights, and what is saved of it, stay as they are.

    Returns:
        Whether its encoders and its pooling are known; if not, nothing is changed.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformers = set(text_towers(model).values())
    encoders = [transformer.auto_model for transformer in transformers]
    poolings: list[Any] = [module for module in model.modules() if isinstance(module, Pooling)]
    if not all(_gives_token_vectors(each) and _reads_spans(each.auto_model) for each in transformers):
        return False
    if not all(_pools_spans(each) for each in poolings) or not all(
        _keeps_texts_apart(route) for route in _routes(model)
    ):
        return False
    if len(poolings) != len(encoders):
        return False
    for encoder in encoders:
        _read_spans(encoder)
        fuse_sublayers(encoder)
    for pooling in poolings:
        pooling.forward = types.MethodType(pool_features, pooling)
    return True


def _routes(model: SentenceTransformer) -> list[list[Any]]:
    """The modules that a text passes through, of each route of a model."""
    first: Any = model[0]
    rest = list(model)[1:]
    if not hasattr(first, "sub_modules"):
        return [[first, *rest]]
    return [[*route, *rest] for route in first.sub_modules.values()]


def _gives_token_vectors(transformer: Any) -> bool:
    """Whether a Transformer module gives its encoder no token types, and hands on its last vectors of all tokens."""
    text = transformer.modality_config["text"]
    return (
        (text["method"], text["method_output_name"]) == ("forward", "last_hidden_state")
        and transformer.module_output_name == "token_embeddings"
        and not getattr(transformer.auto_model.config, "output_hidden_states", False)
        and getattr(transformer, "token_types", None) is None
    )


def _reads_spans(encoder: Any) -> bool:
    config = encoder.config
    if getattr(config, "is_decoder", False) or getattr(config, "chunk_size_feed_forward", 0):
        return False
    # Families of encoders have no causal kind, and those of decoders say by it which they are.
    encodes = config.model_type in (*ENCODERS, "mpnet") and not getattr(config, "is_causal", False)
    return encodes or config.model_type in DECODERS


def _keeps_texts_apart(modules: list[Any]) -> bool:
    """Whether nothing before the pooling looks at more than one token, and nothing after it at tokens."""
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Normalize, Pooling

    kinds = [type(module) for module in modules]
    if kinds.count(Pooling) != 1:
        return False
    place = kinds.index(Pooling)
    return {*kinds[1:place]} <= {Dense, Normalize} and {*kinds[place + 1 :]} <= {Dense, Normalize, LayerNorm, Dropout}


def _pools_spans(pooling: Any) -> bool:
    modes = pooling.pooling_mode
    return modes in MODES or (not isinstance(modes, str) and len(modes) == 1 and modes[0] in MODES)


def _read_spans(encoder: Any) -> None:
    if encoder.config.model_type == "mpnet":
        mpnet.read_spans(encoder)
        return
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attention)
    encoder.set_attn_implementation(_ATTENTION)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: Spans,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: [1, heads, tokens, width] in, [1, tokens, heads, width] out."""
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if sliding_window is not None:
        # Modules add one to what they are given, or not; transformers' masks go by the configuration: a token sees
        # those at most `sliding_window` away on both sides, or as many before it, itself among them.
        config: Any = module.config
        sliding_window = config.sliding_window - 1 if causal else config.sliding_window
    out = spans_attention(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        spans,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        causal=causal,
        window=sliding_window,
    )
    return out.unsqueeze(0), None
