"""A step with each option of the loss has the gradients of the loss that a full matrix in float64 gives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_helpers import assert_same, results
from torch import Tensor
from torch.nn.functional import normalize

import retriever
from index.progress import Reporter, SilentReporter
from retriever.config.data import DataConfig
from retriever.config.loss import LossConfig
from retriever.config.loss_options import GuideConfig, LimitConfig, MatryoshkaConfig, SourceLossConfig, TeacherConfig
from retriever.config.model import ModelConfig
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.data.batches import TrainingBatch
from retriever.errors import ConfigError
from retriever.training import step as step_module
from retriever.training.objective.checks import check_dimension, check_objective, has_statistics
from retriever.training.objective.hardest import describe_hardest, hardest_negative
from retriever.training.objective.sources import loss_of_source
from retriever.training.objective.statistics import statistics_row
from retriever.training.run_dir import build_configured_towers
from retriever.training.step import TrainStep
from retriever.training.trainer import Trainer

WORDS = ["cat", "dog", "run", "walk", "eat", "sleep", "tree", "house", "river", "stone", "blue", "red", "small", "old"]
SCALE = 9.0


def rows_of_data() -> list[dict[str, Any]]:
    """Rows with one to three positives and up to three hard negatives, some of them false."""
    random = np.random.default_rng(0)

    def text() -> str:
        return " ".join(random.choice(WORDS, size=4))

    rows: list[dict[str, Any]] = [
        {"query": text(), "positive": [text() for _ in range(1 + i % 3)], "negatives": [text() for _ in range(i % 4)]}
        for i in range(12)
    ]
    # The same query with another positive, which is a hard negative of the first row; a passage of two queries.
    rows.append({"query": rows[2]["query"], "positive": [rows[3]["negatives"][0]], "negatives": []})
    rows[2]["negatives"] = [rows[12]["positive"][0], rows[5]["positive"][0]]
    rows[7]["positive"].append(rows[8]["positive"][1])
    return rows


@pytest.fixture
def config(tiny: ModelConfig, tmp_path: Path) -> TrainConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of_data()))
    return TrainConfig(
        out=str(tmp_path / "run"),
        model=dataclasses.replace(tiny, dropout=0.0),
        data=DataConfig(sources=(SourceConfig(path=str(path)),), workers=0, negatives=2),
        loss=LossConfig(logit_scale=SCALE),
        batch_size=13,
        steps=1,
        micro_batch_tokens=90,
        precision="fp32",
        device="cpu",
    )


@pytest.fixture
def guide_folder(config: TrainConfig, tmp_path: Path) -> str:
    """A model with other weights than those that are trained."""
    torch.manual_seed(7)
    towers = build_configured_towers(config)
    (folder := tmp_path / "guide").mkdir()
    towers.save(folder)
    return str(folder)


def expected_loss(batch: TrainingBatch, query: Tensor, passage: Tensor, own: Tensor, config: TrainConfig) -> Tensor:
    """The loss from the texts alone: scores [M, N] in float64 and a loop over queries and columns."""
    loss, rows, guide = config.loss, rows_of_data(), None
    if loss.guide.given:
        model = retriever.load(loss.guide.model)
        guide = model.encode_queries(batch.queries), model.encode_passages(batch.passages)
    known = {(row["query"], text) for row in rows for text in row["positive"]}
    in_row = {(row["query"], tuple(row["positive"])) for row in rows}
    pool = batch.positives + batch.further_positives + batch.negatives
    cosine, owners = query @ passage.T, np.repeat(np.arange(len(query)), _counts(batch))
    constant = cosine.detach()
    exponent = cosine * SCALE + loss.hardness * constant

    def is_positive(i: int, j: int) -> bool:
        # A further positive of query i follows the positives of all queries.
        several = config.data.positives == "all" and len(query) <= j < len(query) + len(batch.further_positives)
        own_rows = [texts for text, texts in in_row if text == batch.queries[i] and batch.positives[i] in texts]
        return j == i or (several and pool[j] in own_rows[0] and _owner(batch, j) == i)

    def is_negative(i: int, j: int) -> bool:
        limit = torch.inf
        if loss.limit.margin is not None:
            limit = float(constant[i, i]) + loss.limit.margin
        if loss.limit.share is not None:
            limit = min(limit, float(constant[i, i]) - (1 - loss.limit.share) * abs(float(constant[i, i])))
        if guide is not None and float(guide[0][i] @ guide[1][j]) > float(guide[0][i] @ guide[1][i]) - GUIDE_MARGIN:
            limit = -torch.inf
        known_pair = (batch.queries[i], pool[j]) in known
        return not is_positive(i, j) and not known_pair and float(constant[i, j]) <= limit

    def of_line(scores: Tensor, positives: list[int], others: list[Tensor]) -> Tensor:
        negatives = torch.stack(others) if others else scores.new_empty(0)
        if loss.positives_reduction == "sum":
            chosen = scores[positives].logsumexp(0)
            return torch.cat([chosen[None], negatives]).logsumexp(0) - chosen
        return torch.stack([torch.cat([scores[p][None], negatives]).logsumexp(0) - scores[p] for p in positives]).mean()

    parts, columns = [], []
    for i in range(len(query)):
        negatives = [exponent[i, j] for j in range(len(pool)) if is_negative(i, j)]
        of_own = [query[i] @ own[h] for h in np.flatnonzero(owners == i)]
        negatives += [SCALE * product + loss.hardness * product.detach() for product in of_own]
        if loss.same_side:
            same = [j for j in range(len(query)) if batch.queries[j] != batch.queries[i]]
            negatives += [SCALE * (query[i] @ query[j]) for j in same]
        positives = [j for j in range(len(pool)) if is_positive(i, j)]
        parts.append(of_line(SCALE * cosine[i], positives, negatives))
    result = torch.stack(parts).mean()
    if loss.symmetric:
        for j in range(len(pool)):
            positives = [i for i in range(len(query)) if is_positive(i, j)]
            negatives = [exponent[i, j] for i in range(len(query)) if is_negative(i, j)]
            if positives:
                columns.append(of_line(SCALE * cosine[:, j], positives, negatives))
        result = (result + torch.stack(columns).mean()) / 2
    return result


def _counts(batch: TrainingBatch) -> list[int]:
    return [0] * len(batch.queries) if batch.own_offsets is None else np.diff(batch.own_offsets).tolist()


def _owner(batch: TrainingBatch, passage: int) -> int:
    """The query whose row has a further positive: they follow one another in the order of the queries."""
    rows = {(row["query"], text): tuple(row["positive"]) for row in rows_of_data() for text in row["positive"]}
    counts = [len(rows[query, text]) - 1 for query, text in zip(batch.queries, batch.positives, strict=True)]
    return int(np.repeat(np.arange(len(counts)), counts)[passage - len(batch.queries)])


GUIDE_MARGIN = 0.001
GUIDE = GuideConfig("guide", GUIDE_MARGIN)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "limit by share, symmetric": ({"limit": LimitConfig(share=0.99), "symmetric": True}, {}),
    "limit by margin": ({"limit": LimitConfig(margin=0.02)}, {}),
    "hardness": ({"hardness": 3.0, "symmetric": True}, {}),
    "same side": ({"same_side": True}, {}),
    "all positives": ({"symmetric": True}, {"positives": "all"}),
    "all positives, summed": ({"positives_reduction": "sum"}, {"positives": "all"}),
    "own negatives": ({}, {"negatives_seen_by": "own"}),
    "guide": ({"guide": GUIDE, "symmetric": True}, {}),
    "guide, embedded before": ({"guide": GuideConfig("guide", GUIDE_MARGIN, "before")}, {}),
    "hardness of own negatives": ({"hardness": 3.0}, {"negatives_seen_by": "own"}),
    "prefixes with masks": (
        {"matryoshka": MatryoshkaConfig((5, 16), (0.5, 1.0)), "limit": LimitConfig(margin=0.02), "guide": GUIDE},
        {"positives": "all", "negatives_seen_by": "own"},
    ),
    "many": (
        {"guide": GUIDE, "limit": LimitConfig(margin=0.1), "symmetric": True, "statistics": "numbers"},
        {"positives": "all", "negatives_seen_by": "own", "negatives": 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_has_the_gradients_of_the_reference_loss(
    config: TrainConfig, case: str, guide_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, data = CASES[case]
    monkeypatch.chdir(Path(guide_folder).parent)
    config = dataclasses.replace(
        config, loss=dataclasses.replace(config.loss, **loss), data=dataclasses.replace(config.data, **data)
    )
    trainer = Trainer.start(config, SilentReporter())
    batch, towers = trainer.batches.batch(0), trainer.towers.train()
    found: dict[Tensor, Tensor] = {}

    def record(parameters: list[Tensor], ranks: Any) -> None:
        found.update((p, p.grad.clone()) for p in parameters if p.grad is not None)

    monkeypatch.setattr(step_module, "average_gradients", record)
    texts = [batch.queries, batch.passages, batch.own_negatives]
    tokens = towers.tokenizer("document")([text for group in texts for text in group])
    embeddings = towers.embed(tokens, np.arange(len(tokens)), "document").double()
    query, passage, own = embeddings.split([len(group) for group in texts])
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    prefixes = config.loss.matryoshka
    if prefixes.given:
        parts = [[normalize(side[:, :size], dim=1) for side in (query, passage, own)] for size in prefixes.dims]
        of_prefixes = [expected_loss(batch, *sides, config) for sides in parts]
        expected = torch.stack([w * each for w, each in zip(prefixes.weights, of_prefixes, strict=True)]).sum()
    else:
        expected = expected_loss(batch, query, passage, own, config)
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    wanted = {p: g for p, g in zip(parameters, gradients, strict=True) if g is not None}
    prepared = trainer.batches[0]
    result = trainer.train_step(prepared, 0, statistics=True)
    assert float(result.loss) == pytest.approx(expected.item(), rel=1e-5)
    assert expected.item() > 0.3
    assert result.statistics
    if not config.loss.masks_by_score:
        (of_batch,) = result.statistics
        assert prepared.false_negatives.count(prepared.positive_pairs) == int(of_batch.of_loss.masked.sum()) > 0
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert found.keys() == wanted.keys()
    for parameter, reference in wanted.items():
        torch.testing.assert_close(found[parameter], reference, rtol=1e-4, atol=2e-5 * largest)


def test_a_resumed_run_with_options_is_bitwise_equal(
    config: TrainConfig, tmp_path: Path, guide_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, data = CASES["many"]
    monkeypatch.chdir(Path(guide_folder).parent)
    config = dataclasses.replace(
        config,
        loss=dataclasses.replace(config.loss, **loss),
        data=dataclasses.replace(config.data, **data),
        **{"steps": 5, "batch_size": 6, "log_every": 2, "checkpoint_every": 2},
    )
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    Trainer.start(whole, SilentReporter()).train()
    step = TrainStep.__call__

    def killed(self: TrainStep, batch: Any, number: int, **options: Any) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return step(self, batch, number, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "__call__", killed)
        Trainer.start(config, SilentReporter()).train()
    Trainer.resume(Path(config.out), SilentReporter()).train()
    assert_same(results(Path(config.out)), results(Path(whole.out)))
    rows = results(Path(config.out))["rows"]
    assert [row["step"] for row in rows if "pool_masked" in row] == [2, 4, 5]
    for row in rows:
        rules = ("duplicates", "known", "limit", "guide")
        assert row["pool_masked"] == pytest.approx(sum(row[f"pool_masked_{rule}"] for rule in rules))
        assert 0 < row["pool_mrr"] <= 1 <= row["pool_rank"] and abs(row["pool_hardest"]) <= 1.001


SIGMOID = {
    "known positives": {},
    "limit": {"limit": LimitConfig(margin=0.02)},
    "guide": {"guide": GUIDE},
    "all": {"limit": LimitConfig(share=0.99), "guide": GUIDE},
}


@pytest.mark.parametrize("case", SIGMOID)
def test_the_sigmoid_loss_masks_by_each_rule(
    config: TrainConfig, case: str, guide_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(guide_folder).parent)
    loss = dataclasses.replace(config.loss, name="sigmoid", logit_bias=-2.0, **SIGMOID[case])
    trainer = Trainer.start(dataclasses.replace(config, loss=loss), SilentReporter())
    batch, towers = trainer.batches.batch(0), trainer.towers.train()
    tokens = towers.tokenizer("document")([*batch.queries, *batch.passages])
    with torch.no_grad():
        embeddings = towers.embed(tokens, np.arange(len(tokens)), "document").double()
    cosine = embeddings[: len(batch.queries)] @ embeddings[len(batch.queries) :].T
    known_pairs = {(row["query"], text) for row in rows_of_data() for text in row["positive"]}
    known = torch.tensor([[(query, text) in known_pairs for text in batch.passages] for query in batch.queries])
    positive, of_positive = torch.eye(*cosine.shape, dtype=torch.bool), cosine.diagonal()[:, None]
    removed = known & ~positive
    if loss.limit.margin is not None:
        removed |= ~positive & (cosine > of_positive + loss.limit.margin)
    if loss.limit.share is not None:
        removed |= ~positive & (cosine > of_positive - (1 - loss.limit.share) * of_positive.abs())
    if loss.guide.given:
        model = retriever.load(loss.guide.model)
        guided = model.encode_queries(batch.queries) @ model.encode_passages(batch.passages).T
        removed |= ~positive & torch.from_numpy(guided > np.diagonal(guided)[:, None] - loss.guide.margin)
    sign = torch.where(positive, -1.0, 1.0)
    terms = torch.nn.functional.softplus(sign * (SCALE * cosine - 2.0)).masked_fill(removed, 0)
    result = trainer.train_step(trainer.batches[0], 0)
    assert float(result.loss) == pytest.approx(float(terms.sum() / len(cosine)), rel=1e-5)


def test_each_rule_counts_what_it_masks_and_the_hardest_negative_is_shown(
    config: TrainConfig, guide_folder: str
) -> None:
    options = {"guide": GuideConfig(guide_folder, 0.01), "limit": LimitConfig(margin=0.02), "statistics": "texts"}
    trainer = Trainer.start(
        dataclasses.replace(config, loss=dataclasses.replace(config.loss, **options)), SilentReporter()
    )
    batch, towers, model = trainer.batches.batch(0), trainer.towers.train(), retriever.load(guide_folder)
    tokens = towers.tokenizer("document")([*batch.queries, *batch.passages])
    with torch.no_grad():
        embeddings = towers.embed(tokens, np.arange(len(tokens)), "document").double()
    cosine = (embeddings[: len(batch.queries)] @ embeddings[len(batch.queries) :].T).numpy()
    guided = model.encode_queries(batch.queries) @ model.encode_passages(batch.passages).T
    known_pairs = {(row["query"], text) for row in rows_of_data() for text in row["positive"]}
    known = np.array([[(query, text) in known_pairs for text in batch.passages] for query in batch.queries])
    own = np.eye(*cosine.shape, dtype=bool)
    limit = ~known & (cosine > np.diagonal(cosine)[:, None] + 0.02)
    by_guide = ~known & ~limit & (guided > np.diagonal(guided)[:, None] - 0.01)
    # Read before the step changes the weights.
    (found,) = trainer.train_step(trainer.batches[0], 0, statistics=True).statistics
    row = statistics_row(found, trainer.loss.logit_scale, trainer.config.loss, trainer.ranks)
    counts = {rule: row[f"pool_masked_{rule}"] * cosine.size for rule in ("duplicates", "known", "limit", "guide")}
    assert counts["duplicates"] + counts["known"] == pytest.approx((known & ~own).sum())
    assert counts["limit"] == pytest.approx(limit.sum()) and counts["guide"] == pytest.approx(by_guide.sum())
    assert min(counts.values()) > 0.9 and row["pool_masked"] * cosine.size == pytest.approx(sum(counts.values()))

    negatives = np.where(known | own | limit | by_guide, -np.inf, cosine)
    query = int(negatives.max(1).argmax())
    removed = np.where((known & ~own) | limit | by_guide, cosine, -np.inf)[query]
    assert found.hardest is not None
    shown = hardest_negative(found.hardest, found.part, trainer.config.loss)
    assert shown is not None and "masked" in shown
    assert (shown["query"], shown["positive"]) == (batch.queries[query], batch.positives[query])
    assert shown["negative"] == batch.passages[int(negatives[query].argmax())]
    assert shown["negative_score"] == pytest.approx(negatives.max(), abs=1e-4)
    masked = int(removed.argmax())
    assert (shown["masked"], shown["masked_score"]) == (
        batch.passages[masked],
        pytest.approx(removed[masked], abs=1e-4),
    )
    rules = {"known positives": known, "limit": limit, "guide": by_guide}
    assert rules[shown["masked_by"]][query, masked]
    assert shown["masked"] in describe_hardest(shown) and shown["negative"] in describe_hardest(shown)


def test_the_texts_are_logged_and_each_source_has_its_statistics_in_blocks(
    config: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    (source,) = config.data.sources
    limited = dataclasses.replace(source, weight=1, loss=SourceLossConfig(limit=LimitConfig(margin=0.02)))
    sources = (dataclasses.replace(source, weight=1), limited)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=sources, mix="blocks"),
        loss=dataclasses.replace(config.loss, statistics="texts"),
        **{"steps": 2, "log_every": 1},
    )
    with caplog.at_level("INFO", logger="retriever"):
        Trainer.start(config, Reporter()).train()
    first, second = results(Path(config.out))["rows"]
    for row in (first, second):
        for name in ("pool_rank", "pool_masked", "pool_accuracy@1"):
            # The sources have 6 and 7 rows of the batch, or 7 and 6.
            shares = [
                share
                for share in (6 / 13, 7 / 13)
                if row[name] == pytest.approx(share * row[f"{name}/rows_0"] + (1 - share) * row[f"{name}/rows_1"])
            ]
            assert shares
        assert "pool_masked_limit/rows_0" not in row and row["pool_masked_limit/rows_1"] > 0
        assert row["hardest_negative"]["query"] in {row["query"] for row in rows_of_data()}
    assert caplog.text.count("hardest negative") == 2


def test_a_source_has_its_own_logit_scale_and_options(config: TrainConfig) -> None:
    (source,) = config.data.sources
    of_second = SourceLossConfig(logit_scale=30.0, hardness=2.0, limit=LimitConfig())
    sources = (dataclasses.replace(source, weight=1), dataclasses.replace(source, weight=1, loss=of_second))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sources=sources),
        loss=dataclasses.replace(config.loss, learn_logit_scale=True, limit=LimitConfig(margin=0.01)),
        **{"steps": 4, "log_every": 1},
    )
    trainer = Trainer.start(config, SilentReporter())
    first, second = trainer.train_step.objectives
    assert (first.loss.hardness, second.loss.hardness, second.loss.limit.given) == (0, 2, False)
    trainer.train()
    rows = results(Path(config.out))["rows"]
    assert {key for row in rows for key in row if key.startswith("loss/")} == {"loss/rows_0", "loss/rows_1"}
    scales = [[row[key] for row in rows if key in row] for key in ("logit_scale/rows_0", "logit_scale/rows_1")]
    assert len(scales[0]) == len(scales[1]) == 2
    for start, (before, after) in zip((SCALE, 30.0), scales, strict=True):
        assert before != after and abs(after / start - 1) < 0.01
    resumed = Trainer.resume(Path(config.out), SilentReporter())
    assert loss_of_source(resumed.loss, 1).logit_scale.item() == pytest.approx(scales[1][1], rel=1e-4)
    bad = dataclasses.replace(sources[1], loss=SourceLossConfig(hardness=-1))
    with pytest.raises(ConfigError, match=r"rows.jsonl: loss.hardness: expected"):
        check_objective(dataclasses.replace(config, data=DataConfig(sources=(sources[0], bad))))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "same side and a limit": (
        {"same_side": True, "limit": LimitConfig(margin=0.1)},
        {},
        r"^loss.limit does not combine with loss.same_side: ",
    ),
    "a teacher's scores of own negatives": (
        {"teacher": TeacherConfig("kl")},
        {"negatives_seen_by": "own"},
        r"^loss.teacher.kind kl does not combine with data.negatives_seen_by own: ",
    ),
    "a teacher's embeddings and a limit": (
        {"teacher": TeacherConfig("pool_kl", "teacher"), "limit": LimitConfig(margin=0.1)},
        {},
        r"^loss.teacher.kind pool_kl does not combine with loss.limit: ",
    ),
    "several positives of the sigmoid loss": (
        {"name": "sigmoid"},
        {"positives": "all"},
        r"^data.positives all: not supported by loss.name sigmoid",
    ),
    "options of clip": (
        {"name": "clip", "same_side": True},
        {},
        r"^loss.same_side: not supported by loss.name clip",
    ),
    "dense": ({"implementation": "dense", "hardness": 1.0}, {}, r"^loss.implementation: expected auto with"),
    "statistics": (
        {"statistics": "numbers", "name": "sigmoid"},
        {},
        r"^loss.statistics: not supported by loss.name sigmoid",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_combine_is_refused_by_the_names_of_the_fields(config: TrainConfig, case: str) -> None:
    loss, data, message = REFUSED[case]
    config = dataclasses.replace(
        config, loss=dataclasses.replace(config.loss, **loss), data=dataclasses.replace(config.data, **data)
    )
    with pytest.raises(ConfigError, match=message):
        check_objective(config)


def test_statistics_are_left_out_where_the_loss_does_not_have_them(config: TrainConfig) -> None:
    prefixes = dataclasses.replace(config, loss=LossConfig(matryoshka=MatryoshkaConfig((8, 32))))
    check_objective(prefixes)
    assert has_statistics(config) and has_statistics(prefixes)
    assert not has_statistics(dataclasses.replace(config, loss=LossConfig(name="sigmoid")))
    with pytest.raises(ConfigError, match=r"^loss.matryoshka.dims: expected at most 16, .* found 32"):
        check_dimension(prefixes, 16)
