"""Hugging Face model families that support packed sequences.

A new family is added to ENCODERS, or to DECODERS in loading/decoders.py, and to the table of docs/design/training.md.
The attention of a model is replaced through transformers' AttentionInterface. All other layers work on single tokens;
some of them are replaced by fused kernels. The tests compare every supported family with its padded outputs.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from retriever.models.loading.decoders import DECODERS
from retriever.models.loading.folder import text_towers
from retriever.models.loading.text_settings import has_router
from retriever.models.packed import mpnet
from retriever.models.packed.attention import PackedLayout, packed_attention
from retriever.models.packed.pooling import MODES, pool_features
from retriever.models.packed.sublayers import fuse_sublayers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "modernbert")
_ATTENTION = "retriever_packed"


def enable_packing(model: SentenceTransformer) -> bool:
    """Switch a sentence-transformers model to packed sequences.

    Afterwards the model takes `input_ids` and `position_ids` [1, tokens] of concatenated texts and their `layout`, a
    PackedLayout. It no longer takes padded texts. The weights and the files written by `save` do not change.

    Returns:
        Whether the encoders and the pooling support packed sequences. If not, the model is unchanged.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformers = set(text_towers(model).values())
    encoders = [transformer.auto_model for transformer in transformers]
    poolings: list[Any] = [module for module in model.modules() if isinstance(module, Pooling)]
    supported = (
        all(_returns_token_embeddings(each) and _supports_packing(each.auto_model) for each in transformers)
        and all(_supports_pooling(each) for each in poolings)
        and all(_modules_are_tokenwise(route) for route in _routes(model))
        and len(poolings) == len(encoders)
    )
    if not supported:
        return False
    for encoder in encoders:
        _use_packed_attention(encoder)
        fuse_sublayers(encoder)
    for pooling in poolings:
        pooling.forward = types.MethodType(pool_features, pooling)
    return True


def _routes(model: SentenceTransformer) -> list[list[Any]]:
    """Return the sequence of modules of each route of a model."""
    first: Any = model[0]
    rest = list(model)[1:]
    if not has_router(model):
        return [[first, *rest]]
    return [[*route, *rest] for route in first.sub_modules.values()]


def _returns_token_embeddings(transformer: Any) -> bool:
    """Whether a Transformer module uses no token types and returns the last hidden state of all tokens."""
    text = transformer.modality_config["text"]
    return (
        (text["method"], text["method_output_name"]) == ("forward", "last_hidden_state")
        and transformer.module_output_name == "token_embeddings"
        and not getattr(transformer.auto_model.config, "output_hidden_states", False)
        and getattr(transformer, "token_types", None) is None
    )


def _supports_packing(encoder: Any) -> bool:
    config = encoder.config
    if getattr(config, "is_decoder", False) or getattr(config, "chunk_size_feed_forward", 0):
        return False
    # A causal variant is supported only for decoder families, whose `is_causal` selects the attention.
    is_encoder = config.model_type in (*ENCODERS, "mpnet") and not getattr(config, "is_causal", False)
    return is_encoder or config.model_type in DECODERS


def _modules_are_tokenwise(modules: list[Any]) -> bool:
    """Whether modules before the pooling treat each token by itself, and modules after it use no token embeddings."""
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Normalize, Pooling

    kinds = [type(module) for module in modules]
    if kinds.count(Pooling) != 1:
        return False
    position = kinds.index(Pooling)
    before, after = {*kinds[1:position]}, {*kinds[position + 1 :]}
    return before <= {Dense, Normalize} and after <= {Dense, Normalize, LayerNorm, Dropout}


def _supports_pooling(pooling: Any) -> bool:
    modes = pooling.pooling_mode
    return modes in MODES or (not isinstance(modes, str) and len(modes) == 1 and modes[0] in MODES)


def _use_packed_attention(encoder: Any) -> None:
    if encoder.config.model_type == "mpnet":
        mpnet.use_packed_attention(encoder)
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
    layout: PackedLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: from [1, heads, tokens, width] to [1, tokens, heads, width]."""
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if sliding_window is not None:
        # Some modules pass the configured window plus one. transformers' masks use the configured value: without
        # causal attention a token attends to `sliding_window` tokens on either side; with it to `sliding_window`
        # tokens including itself.
        config: Any = module.config
        sliding_window = config.sliding_window - 1 if causal else config.sliding_window
    out = packed_attention(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        layout,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        causal=causal,
        window=sliding_window,
    )
    return out.unsqueeze(0), None
