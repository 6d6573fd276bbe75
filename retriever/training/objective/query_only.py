"""Checks of `query_only`: training the query tower alone is valid only if the passage embeddings cannot change."""

from __future__ import annotations

from index.files import InputError
from index.store.reader import EmbeddingStore
from retriever.config.run import TrainConfig
from retriever.errors import ConfigError
from retriever.models.modality import load_towers
from retriever.models.passage_side import passage_sha256
from retriever.models.towers import Towers


def check_query_only(config: TrainConfig) -> None:
    """Check the settings that do not go with `query_only`.

    Raises:
        ConfigError: The passage embeddings could change during training, or a setting has no effect with `query_only`.
    """
    if not config.query_only:
        if config.passages_on != "auto":
            raise ConfigError(f"passages_on: expected auto without query_only, found {config.passages_on}")
        return
    if config.model.image.name:
        raise ConfigError("query_only: not supported for a model with an image tower")
    if not config.model.name:
        raise ConfigError("query_only: expected model.name, the model that embedded the store, found none")
    if config.loss.name != "inf_cl":
        raise ConfigError(f"query_only: not supported by loss.name {config.loss.name}; use inf_cl")
    if config.model.lora.rank:
        raise ConfigError(
            f"model.lora.rank: expected 0 with query_only, found {config.model.lora.rank}: adapters are added to the "
            "passage tower, too"
        )
    if config.shard_towers:
        raise ConfigError("shard_towers: expected false with query_only, found true")
    unused = {
        "data.negatives": config.data.negatives,
        "data.positives": config.data.positives == "all",
        "mine_every": config.mine_every is not None,
        "data.mix": config.data.mix == "blocks",
        "data.random_passages": config.data.random_passages,
        "loss.symmetric": config.loss.symmetric,
        "loss.limit": config.loss.limit.given,
        "loss.guide": config.loss.guide.given,
        "loss.hardness": config.loss.hardness,
        "loss.same_side": config.loss.same_side,
        "loss.matryoshka": config.loss.matryoshka.given,
        "loss.statistics": config.loss.statistics not in ("auto", "none"),
        "loss.teacher": config.loss.teacher.uses_embeddings or config.loss.teacher.uses_scores,
    }
    for name, value in unused.items():
        if value:
            raise ConfigError(
                f"{name} does not combine with query_only: its negatives are all passages of the store, which have no "
                "gradients"
            )


def check_two_towers(towers: Towers) -> None:
    """Check that the query tower has weights of its own.

    Raises:
        ConfigError: One tower embeds both queries and passages, so that training would change the passage embeddings.
    """
    if towers.shared:
        raise ConfigError(
            "model.shared: expected false with query_only, found true: training a shared tower would change the "
            "passage embeddings, while those in the store stay the same. Retrieval then collapses: in a measurement on "
            "WordNet, nDCG@10 fell from 0.272 to 0.0001"
        )


def check_fixed_passages(config: TrainConfig, towers: Towers, store: EmbeddingStore) -> None:
    """Check that the store has the embeddings that the passage tower of the run computes, and that it stays so.

    Args:
        config: The configuration.
        towers: The towers of the run, before the first step.
        store: The store of `query_only`.

    Raises:
        InputError: The store belongs to another model, or the configuration changes the passage tower.
    """
    base = load_towers(config.model.name)
    if base.fingerprint() != store.model:
        raise InputError(
            f"query_only: expected embeddings of all dimensions by model.name {config.model.name} in {store.folder}, "
            f"found those of another model ({store.model})"
        )
    if passage_sha256(base) != passage_sha256(towers):
        raise InputError(
            f"query_only: the configuration changes how {config.model.name} embeds passages (model.pooling, "
            "projection, normalize, max_length or passage_prompt), so they would differ from those in the store"
        )
