"""Settings of the loss that do not combine are refused by name before a run starts."""

from __future__ import annotations

import dataclasses

from losses.option_checks.combinations import NOT_DENSE, REFUSED
from retriever.config.run import TrainConfig
from retriever.errors import ConfigError
from retriever.training.objective.query_only import check_query_only
from retriever.training.objective.sources import SourceObjective

# The option of the loss (losses/option_checks/combinations.py) that a field of the configuration sets.
FIELDS = {
    "positives": "data.positives all",
    "negatives.own": "data.negatives_seen_by own",
    "negatives.limit": "loss.limit",
    "negatives.guide": "loss.guide",
    "negatives.hardness": "loss.hardness",
    "negatives.same_side": "loss.same_side",
    "matryoshka": "loss.matryoshka",
    "statistics": "loss.statistics",
    "teacher": "loss.teacher.kind pool_kl",
    "teacher.scores": "loss.teacher.kind",
    "negatives.frozen": "query_only",
}
# The options that the sigmoid loss has.
OF_SIGMOID = ("negatives.limit", "negatives.guide")


def check_objective(config: TrainConfig) -> None:
    """Check that the options of the loss of each source combine with each other and with the loss.

    Raises:
        ConfigError: Two settings do not combine. The message begins with the name of one field and has the other.
    """
    check_query_only(config)
    try:
        objectives = SourceObjective.of_all(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for objective in objectives:
        _check_options(dataclasses.replace(config, loss=objective.loss))


def _check_options(config: TrainConfig) -> None:
    loss, given = config.loss, given_options(config)
    if loss.teacher.uses_scores and not config.data.negatives:
        raise ConfigError(
            f"data.negatives: expected hard negatives with loss.teacher.kind {loss.teacher.kind}, found 0: scores are "
            "compared within a query's own list"
        )
    if loss.teacher.uses_scores and config.data.negatives_seen_by == "own":
        raise ConfigError(
            f"loss.teacher.kind {loss.teacher.kind} does not combine with data.negatives_seen_by own: its lists are of "
            "passages of the batch"
        )
    if config.mine_every is not None and loss.teacher.uses_embeddings:
        raise ConfigError(
            "mine_every does not combine with the embeddings of loss.teacher, which are computed before the first step"
        )
    if config.model.image.name and (loss.teacher.uses_scores or loss.teacher.uses_embeddings):
        raise ConfigError("loss.teacher: not supported for a model with an image tower")
    if config.mine_every is not None and loss.guide.embed == "before":
        raise ConfigError(
            "mine_every does not combine with loss.guide.embed before, which embeds the texts before they are mined"
        )
    if loss.guide.given and config.data.images:
        raise ConfigError("loss.guide.model: expected none with data.images, because a guide embeds texts")
    if loss.statistics == "texts" and config.model.image.name:
        raise ConfigError("loss.statistics: expected auto, none or numbers for a model with an image tower")
    if loss.statistics not in ("auto", "none"):
        given.add("statistics")
    allowed = OF_SIGMOID if loss.name == "sigmoid" else () if loss.name == "clip" else None
    for option in sorted(given):
        if allowed is not None and option not in allowed:
            raise ConfigError(f"{FIELDS[option]}: not supported by loss.name {loss.name}; use inf_cl")
        if loss.name == "sigmoid" and loss.implementation == "triton":
            raise ConfigError(f"loss.implementation: expected auto, full or chunked with {FIELDS[option]}")
        if loss.implementation == "dense" and option in NOT_DENSE:
            raise ConfigError(f"loss.implementation: expected auto with {FIELDS[option]}, found dense")
    for one, other, reason in _refused(given):
        raise ConfigError(f"{FIELDS[one]} does not combine with {FIELDS[other]}: {reason}")


def check_dimension(config: TrainConfig, dimension: int) -> None:
    """Check the sizes of prefixes against the dimension of the embeddings.

    Raises:
        ConfigError: A prefix is longer than an embedding.
    """
    if (dims := config.loss.matryoshka.dims) and dims[-1] > dimension:
        raise ConfigError(
            f"loss.matryoshka.dims: expected at most {dimension}, the dimension of the model, found {dims[-1]}"
        )


def given_options(config: TrainConfig) -> set[str]:
    """Names of the options of the loss, apart from statistics, that a run uses."""
    loss = config.loss
    switches = {
        "positives": config.data.positives == "all",
        "negatives.own": config.data.negatives_seen_by == "own",
        "negatives.limit": loss.limit.given,
        "negatives.guide": loss.guide.given,
        "negatives.hardness": loss.hardness > 0,
        "negatives.same_side": loss.same_side,
        "matryoshka": loss.matryoshka.given,
        "teacher": loss.teacher.kind == "pool_kl",
        "teacher.scores": loss.teacher.uses_scores,
    }
    return {name for name, is_given in switches.items() if is_given}


def has_statistics(config: TrainConfig) -> bool:
    """Whether steps that are logged compute statistics."""
    if config.query_only:
        # Statistics are about the passages of the batch, of which none is a negative.
        return False
    if config.loss.statistics != "auto":
        return config.loss.statistics != "none"
    return config.loss.name == "inf_cl" and not _refused({*given_options(config), "statistics"})


def _refused(given: set[str]) -> list[tuple[str, str, str]]:
    """Pairs of given options that do not combine, and why."""
    return [
        (one, other, reason)
        for some, others, reason in REFUSED
        for one in some
        for other in others
        if one in given and other in given
    ]
