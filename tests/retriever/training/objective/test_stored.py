"""Frozen passages of a store, a teacher's embeddings and scores, and random passages, in training runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import MEANINGS, write_beir, write_lines
from run_helpers import assert_same, results
from torch.nn.functional import cosine_similarity, kl_div, log_softmax, softmax

import retriever
from index.progress import SilentReporter
from index.store.reader import EmbeddingStore
from retriever.config.model import ModelConfig
from retriever.config.yaml_file import config_from_mapping
from retriever.errors import ConfigError
from retriever.models.modality import build_towers, load_towers
from retriever.models.passage_side import PASSAGE_FILE, passage_sha256
from retriever.training.step import TrainStep
from retriever.training.train import plan_run
from retriever.training.trainer import Trainer
from retriever.utils.interrupt import Interrupted

WORDS = list(MEANINGS.items())


@dataclasses.dataclass(frozen=True)
class Data:
    """A model folder, its store of a BEIR corpus, and rows of which the first two share a query."""

    folder: Path
    model: str
    store: str
    beir: str
    pairs: str

    def settings(self, out: Path, **other: Any) -> dict[str, Any]:
        source = {"path": self.pairs}
        return {
            "out": str(out),
            "model": {"name": self.model, "dropout": 0.0, **other.pop("model", {})},
            "data": {"sources": [source], "workers": 0, **other.pop("data", {})},
            "optim": {"lr": 1e-3},
            "batch_size": 8,
            "steps": 3,
            "device": "cpu",
            "precision": "fp32",
            **other,
        }

    def trainer(self, out: Path, **other: Any) -> Trainer:
        return Trainer.start(config_from_mapping(self.settings(out, **other)), SilentReporter())


@pytest.fixture(scope="module")
def data(tiny: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    (folder / "model").mkdir()
    build_towers(tiny).save(folder / "model")
    beir = write_beir(folder / "words")
    passage = [f"{word} {meaning}" for word, meaning in WORDS]
    rows: list[object] = [
        {
            "query": f"what is a {word}?" if i else f"what is a {WORDS[1][0]}?",
            "positive": passage[i],
            "negatives": [passage[(i + 5) % 20], passage[(i + 9) % 20]],
            "scores": [3.0, 1.0 + i / 20, 0.5],
        }
        for i, (word, _) in enumerate(WORDS)
    ]
    pairs = write_lines(folder / "pairs.jsonl", rows)
    retriever.encode(str(folder / "model"), beir, folder / "store", device="cpu", shard_rows=7)
    return Data(folder, str(folder / "model"), str(folder / "store"), str(beir), str(pairs))


def query_only(made: Data, out: Path, **other: Any) -> Trainer:
    return made.trainer(out, query_only=made.store, model={"shared": False}, **other)


def step_gradients(trainer: Trainer, step: int = 0) -> tuple[float, dict[str, torch.Tensor], Any]:
    """Loss and gradients of a step, without the update."""
    parts, found = trainer.components, {}
    batch = parts.batches[step]

    def keep(*_: Any, **__: Any) -> None:
        found.update({n: p.grad.clone() for n, p in parts.towers.named_parameters() if p.grad is not None})

    parts.optimizer.step = keep  # type: ignore[method-assign]
    config = dataclasses.replace(parts.config.optim, max_grad_norm=1e9)
    step_call = dataclasses.replace(parts.train_step, config=dataclasses.replace(parts.config, optim=config))
    return float(step_call(batch, step).loss), found, batch


@pytest.mark.parametrize("place", ["device", "disk"])
def test_query_only_is_the_exact_softmax_over_the_corpus(data: Data, tmp_path: Path, place: str) -> None:
    trainer = query_only(data, tmp_path / "run", passages_on=place)
    towers = trainer.towers
    loss, gradients, batch = step_gradients(trainer)
    texts = trainer.batches.batch(0)
    corpus = torch.from_numpy(EmbeddingStore.open(data.store).vectors()).double()
    contents = [f"{word} {meaning}" for word, meaning in WORDS]
    queries = torch.cat([batch.groups[0].embed(towers, rows) for rows in batch.groups[0].micro_batches])
    order = np.concatenate(batch.groups[0].micro_batches)
    losses = []
    for vector, row in zip(queries, order, strict=True):
        positive = contents.index(texts.positives[row])
        scores = trainer.loss.logit_scale.double() * (corpus @ vector.double())
        # Both positives of the query that has two are not negatives of it.
        others = {0, 1} if texts.queries[row] == f"what is a {WORDS[1][0]}?" else {positive}
        counted = [i for i in range(20) if i == positive or i not in others]
        losses.append(scores[counted].logsumexp(0) - scores[positive])
    expected = torch.stack(losses).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    towers.zero_grad()
    expected.backward()
    trained = {name: weight.grad for name, weight in towers.named_parameters() if weight.requires_grad}
    assert gradients.keys() == {name for name, gradient in trained.items() if gradient is not None}
    assert all("document" not in name for name in gradients) and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, trained[name], atol=2e-6, rtol=1e-4)


def test_query_only_keeps_the_passages_and_their_index(data: Data, tmp_path: Path) -> None:
    index = retriever.build_index(data.store, tmp_path / "index")
    trainer = query_only(data, tmp_path / "run", dev={"path": data.beir, "every": 2})
    before = passage_sha256(load_towers(data.model))
    folder = trainer.train()
    trained = load_towers(str(folder))
    assert passage_sha256(trained) == before and trained.fingerprint() == load_towers(data.model).fingerprint()
    assert trained.sha256() != load_towers(data.model).sha256()
    again = retriever.encode(str(folder), data.beir, tmp_path / "again", device="cpu", shard_rows=7)
    assert again.vectors().tobytes() == EmbeddingStore.open(data.store).vectors().tobytes()
    old, new = (retriever.load(name).encode_queries(["what is a cat?"]) for name in (data.model, folder))
    assert np.abs(old - new).max() > 1e-3
    found = retriever.search(str(folder), index, "what is a cat?", k=1)[0].results[0]
    assert found.score == pytest.approx(float((again.vectors() @ new[0]).max()), abs=1e-6)
    # Continues from a query-only model; a changed passage tower is noticed.
    second = data.settings(tmp_path / "second", query_only=data.store, steps=1)
    second["model"]["name"] = str(folder)
    retriever.train(second)
    record = json.loads((folder / PASSAGE_FILE).read_text())
    (folder / PASSAGE_FILE).write_text(json.dumps({**record, "passage_sha256": "0" * 64}))
    with pytest.raises(retriever.InputError, match="the model was changed since"):
        load_towers(str(folder))


def test_configurations_that_would_collapse_are_refused(data: Data, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.shared: expected false with query_only.*Retrieval then collapses"):
        data.trainer(tmp_path / "a", query_only=data.store)
    with pytest.raises(retriever.InputError, match=r"the configuration changes how .* embeds passages"):
        data.trainer(tmp_path / "b", query_only=data.store, model={"shared": False, "passage_prompt": "p: "})
    other = tmp_path / "other"
    (other / "model").mkdir(parents=True)
    towers = load_towers(data.model)
    with torch.no_grad():
        next(towers.parameters()).add_(0.1)
    towers.save(other / "model")
    with pytest.raises(retriever.InputError, match="found those of another model"):
        data.trainer(tmp_path / "c", query_only=data.store, model={"shared": False, "name": str(other / "model")})
    with pytest.raises(ConfigError, match=r"loss.symmetric does not combine with query_only"):
        query_only(data, tmp_path / "d", loss={"symmetric": True})
    rows: list[object] = [{"query": f"q{i}", "positive": f"nowhere {i}"} for i in range(9)]
    source = {"path": str(write_lines(tmp_path / "pairs.jsonl", rows))}
    with pytest.raises(retriever.InputError, match=r"query_only: expected every passage .*9 are missing.*nowhere 0"):
        query_only(data, tmp_path / "e", data={"sources": [source], "workers": 0})
    # Positives may be ids of passages.
    rows = [{"query": f"q{i}", "positive": f"d{i}"} for i in range(9)]
    source = {"path": str(write_lines(tmp_path / "ids.jsonl", rows))}
    trainer = query_only(data, tmp_path / "f", data={"sources": [source], "workers": 0})
    batch = trainer.batches.batch(0)
    assert batch.stored is not None
    assert [f"d{row}" for row in batch.stored.positive.tolist()] == batch.positives


def texts_embedded(trainer: Trainer, batch: Any) -> torch.Tensor:
    (group,) = batch.groups
    rows = np.concatenate(group.micro_batches)
    embedded = torch.cat([group.embed(trainer.towers, part) for part in group.micro_batches])
    return embedded[torch.from_numpy(np.argsort(rows))].double()


def test_a_teacher_s_embeddings_are_distilled_over_the_pool(data: Data, tmp_path: Path) -> None:
    teacher = {"kind": "pool_kl", "model": data.model, "scale": 7.0, "weight": 0.5, "regression": 0.25}
    cache = str(tmp_path / "cache")
    trainer = data.trainer(tmp_path / "run", loss={"teacher": teacher}, data={"negatives": 1, "cache": cache})
    loss, gradients, batch = step_gradients(trainer)
    texts = trainer.batches.batch(0)
    queries, passages = (t.double() for t in texts_embedded(trainer, batch).split([8, 16]))
    model = retriever.load(data.model)
    of_query = torch.from_numpy(model.encode_queries(texts.queries)).double()
    of_passage = torch.from_numpy(model.encode_passages(texts.passages)).double()
    scores = 20 * queries @ passages.T
    known = set(map(tuple, texts.false_negatives.excluded.tolist()))
    same = texts.false_negatives.passage_ids[None] == texts.false_negatives.query_ids[:, None]
    masked = torch.from_numpy(same.copy()).fill_diagonal_(False)
    for pair in known:
        masked[pair] = True
    scores = scores.masked_fill(masked, -torch.inf)
    wanted = softmax((7 * of_query @ of_passage.T).masked_fill(masked, -torch.inf), 1)
    contrastive = (scores.logsumexp(1) - scores.diagonal()).mean()
    divergence = kl_div(log_softmax(scores, 1).masked_fill(masked, 0), wanted, reduction="sum") / 8
    projection = trainer.components.train_step.stored.teacher.projection.weight.double()
    similarity = cosine_similarity(torch.cat([queries, passages]) @ projection.T, torch.cat([of_query, of_passage]))
    expected = contrastive + 0.5 * divergence + 0.25 * (1 - similarity).mean()
    # The teacher's embeddings are stored in float16.
    assert loss == pytest.approx(expected.item(), abs=2e-3)
    trainer.towers.zero_grad()
    expected.backward()
    for name, weight in trainer.towers.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], weight.grad, atol=5e-3, rtol=2e-2)
    # The stores are reused, by content.
    stores = sorted(Path(cache).glob("texts-*"))
    assert len(stores) == 2
    times = [(path / "manifest.json").stat().st_mtime_ns for path in stores]
    again = data.trainer(tmp_path / "again", loss={"teacher": teacher}, data={"negatives": 1, "cache": cache})
    assert [(path / "manifest.json").stat().st_mtime_ns for path in stores] == times
    assert step_gradients(again)[0] == loss
    # As given stores: the same.
    passages_store, queries_store = sorted(map(str, stores))
    given = {**teacher, "model": "", "passages": passages_store, "queries": queries_store}
    third = data.trainer(tmp_path / "third", loss={"teacher": given}, data={"negatives": 1, "cache": cache})
    assert step_gradients(third)[0] == loss


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
def test_a_teacher_s_scores_are_distilled_within_lists(data: Data, tmp_path: Path, kind: str) -> None:
    options = {"negatives": 2}
    plain = step_gradients(data.trainer(tmp_path / "plain", data=options))[0]
    loss = {"teacher": {"kind": kind, "weight": 0.5}}
    trainer = data.trainer(tmp_path / "run", loss=loss, data=options)
    found, _, batch = step_gradients(trainer)
    queries, passages = texts_embedded(trainer, batch).split([8, 24])
    lists = batch.teacher
    terms = []
    for i in range(8):
        span = slice(lists.offsets[i], lists.offsets[i + 1])
        scores = 20 * passages[torch.from_numpy(lists.passages[span])] @ queries[i]
        given = torch.from_numpy(lists.scores[span]).double()
        if kind == "kl":
            terms.append(kl_div(log_softmax(scores, 0), softmax(given, 0), reduction="sum"))
        else:
            terms.append(((scores[0] - scores[1:]) - (given[0] - given[1:])).square().mean())
    assert found == pytest.approx(plain + 0.5 * torch.stack(terms).mean().item(), rel=1e-5)
    with pytest.raises(ConfigError, match=r"data.negatives: expected hard negatives with loss.teacher.kind"):
        data.trainer(tmp_path / "none", loss=loss)


def test_random_passages_are_negatives_with_gradients(data: Data, tmp_path: Path) -> None:
    options = {"random_passages": 5, "corpus": data.beir}
    trainer = data.trainer(tmp_path / "run", data=options)
    loss, _, batch = step_gradients(trainer)
    texts = trainer.batches.batch(0)
    contents = [f"{word} {meaning}" for word, meaning in WORDS]
    assert len(texts.passages) == 13 and len(set(texts.passages[8:])) == 5 and set(texts.passages) <= set(contents)
    queries, passages = texts_embedded(trainer, batch).split([8, 13])
    scores = 20 * queries @ passages.T
    for i, query in enumerate(texts.queries):
        known = {contents[0], contents[1]} if query == f"what is a {WORDS[1][0]}?" else {texts.positives[i]}
        for j, passage in enumerate(texts.passages):
            if j != i and passage in known:
                scores[i, j] = -torch.inf
    assert loss == pytest.approx((scores.logsumexp(1) - scores.diagonal()).mean().item(), rel=1e-5)
    assert trainer.batches.batch(1).passages[8:] != texts.passages[8:]
    with pytest.raises(retriever.InputError, match=r"data.random_passages: expected at most 20"):
        data.trainer(tmp_path / "many", data={"random_passages": 21, "corpus": data.beir})


MAKE_STEP = TrainStep.__call__


def stop_in_second(train_step: TrainStep, batch: Any, number: int, **options: Any) -> Any:
    if number == 1:
        raise Interrupted("SIGTERM")
    return MAKE_STEP(train_step, batch, number, **options)


def test_interrupted_runs_resume_exactly(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = {"kind": "pool_kl", "model": data.model, "regression": 1.0}
    cases: dict[str, dict[str, Any]] = {
        "teacher": {
            "loss": {"teacher": teacher},
            "data": {"random_passages": 5, "corpus": data.beir, "cache": str(tmp_path / "cache")},
        },
        "frozen": {"query_only": data.store, "model": {"shared": False}},
        "prefixes": {"loss": {"matryoshka": {"dims": [4, 12, 32]}}, "dev": {"path": data.beir, "dim": 4, "every": 3}},
    }
    for name, settings in cases.items():
        whole = retriever.train(data.settings(tmp_path / name / "whole", checkpoint_every=1, **dict(settings)))
        stopped = data.trainer(tmp_path / name / "stopped", checkpoint_every=1, **dict(settings))
        with monkeypatch.context() as patch:
            patch.setattr(TrainStep, "__call__", stop_in_second)
            with pytest.raises(Interrupted):
                stopped.train()
        resumed = retriever.train(resume=tmp_path / name / "stopped")
        assert_same(results(whole.folder), results(resumed.folder))


def test_a_run_does_not_resume_with_another_teacher(data: Data, tmp_path: Path) -> None:
    towers = load_towers(data.model)
    for name in ("teacher", "other"):
        (tmp_path / name).mkdir()
        with torch.no_grad():
            next(towers.parameters()).add_(0.1)
        towers.save(tmp_path / name)
    loss = {"teacher": {"kind": "pool_kl", "model": str(tmp_path / "teacher")}}
    run = retriever.train(data.settings(tmp_path / "run", loss=loss, checkpoint_every=1))
    (tmp_path / "teacher").rename(tmp_path / "before")
    (tmp_path / "other").rename(tmp_path / "teacher")
    with pytest.raises(retriever.InputError, match=r"the data changed since step 3"):
        retriever.train(resume=run.folder)


def test_training_against_moving_passages_is_refused_and_a_plan_counts_the_store(data: Data, tmp_path: Path) -> None:
    for settings, message in (
        ({"data": {"random_passages": 2, "corpus": data.beir}}, "data.random_passages does not combine"),
        ({"loss": {"teacher": {"kind": "pool_kl", "model": data.model}}}, "loss.teacher does not combine"),
        ({"loss": {"name": "sigmoid"}}, "query_only: not supported by loss.name sigmoid"),
        ({"model": {"shared": False, "lora": {"rank": 2}}}, "model.lora.rank: expected 0 with query_only, found 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            data.trainer(tmp_path / "refused", query_only=data.store, **{"model": {"shared": False}, **settings})
    # The average of the weights leaves the passages as they are.
    average = data.settings(tmp_path / "ema", query_only=data.store, model={"shared": False})
    folder = retriever.train({**average, "optim": {"lr": 1e-2, "ema": 0.5}}).model_folder
    assert passage_sha256(load_towers(str(folder))) == passage_sha256(load_towers(data.model))
    config = config_from_mapping(data.settings(tmp_path / "plan", query_only=data.store, model={"shared": False}))
    plan = plan_run(config)
    assert plan.resident["embeddings of query_only"] == 20 * 32 * 4
    assert any(line.startswith("query_only: 20 passages of") for line in plan.notes)
