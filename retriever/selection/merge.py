"""The public function `retriever.merge`, which merges several models of one architecture into one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from index.files import atomic_folder, write_json
from index.progress import Progress, Reporter, as_reporter
from retriever.config.dev import DevConfig
from retriever.distributed.ranks import Ranks
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.model import Model, load
from retriever.errors import (
    ArgumentError,
    check_at_least,
    check_choice,
    check_numbers,
    check_paths,
    path_list,
)
from retriever.models.card.card import ModelCard, write_card
from retriever.models.card.provenance import base_model, common_license
from retriever.models.loading.checksums import write_checksums
from retriever.models.loading.text_settings import SIDES
from retriever.models.modality import load_any_towers
from retriever.models.towers import Towers
from retriever.selection.weights import Method, Weights, check_same_architecture, interpolate
from retriever.training.validation.dev_sets import open_dev_set
from retriever.utils.device import PrecisionChoice
from retriever.utils.versions import COMPUTING, versions

MERGE_FILE = "merge.json"
"""Name of the file in the folder of a merged model that records its sources."""


@dataclass(frozen=True)
class Merge:
    """What `retriever.merge` returns.

    Attributes:
        folder: Folder of the merged model, which sentence-transformers reads too.
        weights: Weight of each source, in the order in which they were merged; the sum is 1.
        metric: Name of the measure on the dev set; "" without one.
        score: The merged model's value of that measure, in [0, 1]; None without a dev set.
        candidates: The merges that were evaluated: "weights" as above, and the measures. Empty without a dev set.
    """

    folder: Path
    weights: dict[str, float]
    metric: str = ""
    score: float | None = None
    candidates: tuple[dict[str, Any], ...] = ()

    @property
    def model(self) -> Model:
        """The merged model, loaded on each access."""
        return load(self.folder)


def merge(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    method: Method = "linear",
    weights: Sequence[float] | None = None,
    dev: str | Path | Sequence[str | Path] | None = None,
    split: str = "dev",
    max_queries: int | None = None,
    grid: int = 10,
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    micro_batch_tokens: int | None = None,
    progress: Progress = None,
) -> Merge:
    """Merge the weights of models that have the same architecture, for example a trained model and its base.

    The result is an ordinary model folder. Its `merge.json` records the sources with the hashes of their contents, the
    weights and, with a dev set, all merges that were evaluated; `merge.md` is the same as a table. Prompts and maximum
    lengths are those of the first model.

    Averages of fine-tuned models are often better than each of them (model soups, Wortsman et al., arXiv 2203.05482),
    and an average with the base model keeps more of the abilities of the base model (WiSE-FT, arXiv 2109.01903).

    Args:
        models: Two or more model folders or hub names.
        out: Folder of the merged model. An existing one is replaced only if it is a merged model.
        method: "linear", a weighted mean, or "slerp", spherical interpolation of each tensor. slerp of more than two
            models merges them one after another. Default: "linear".
        weights: Weight of each model, 0 or more; they are divided by their sum. Default: None, equal weights, or those
            that are best on `dev`.
        dev: BEIR folder or folders, or zero-shot sets for models of images and texts, on which the weights are chosen:
            the models are sorted by their score; each is merged into the result of the better ones with the shares
            0, 1/grid, …, 1, and the best merge is kept. Of several sets, the mean score counts. Default: None.
        split: Split of the dev sets. Default: "dev".
        max_queries: Number of queries of each dev set, the first ones sorted by id. Default: None, all.
        grid: Number of steps between the shares 0 and 1. Default: 10.
        device: Device of the evaluation. Default: "auto".
        precision: Precision of the evaluation, as for `retriever.load`.
        micro_batch_tokens: As for `retriever.load`. Default: None.
        progress: Called with a `ProgressEvent` at each step. Default: None.

    Returns:
        The folder, the weights and the scores.

    Raises:
        InputError: A model or a dev set cannot be read, or two models have different architectures.
        ConfigError: An argument is invalid.
    """
    names, folder = [str(path) for path in path_list("models", models)], Path(out)
    check_paths(out=out)
    check_choice(get_args(Method), method=method)
    check_at_least(1, grid=grid)
    shares = _checked_weights(names, weights, dev)
    _check_out(folder)
    reporter = as_reporter(progress)
    search = None
    if dev is not None:
        paths = tuple(str(path) for path in path_list("dev", dev))
        config = DevConfig(path=paths[0], split=split, max_queries=max_queries)
        if len(paths) > 1:
            config = DevConfig(paths=paths, split=split, max_queries=max_queries)
        model = load(names[0], device=device, precision=precision, micro_batch_tokens=micro_batch_tokens)
        search = _Search(model, config, method, grid, reporter)
    towers, states, digests = _load_all(names, reporter)
    candidates: list[dict[str, Any]] = []
    if search is not None:
        order, shares, candidates = search.run(dict(zip(names, states, strict=True)))
    else:
        order = names
    state, total = states[names.index(order[0])], shares[0]
    for name, share in zip(order[1:], shares[1:], strict=True):
        total += share
        state = interpolate(state, states[names.index(name)], share / total if total else 0.0, method)
    towers.model.load_state_dict(state)
    found = {name: share / sum(shares) for name, share in zip(order, shares, strict=True)}
    metric = "" if search is None else search.metric
    score = max((row[metric.lower()] for row in candidates), default=None)
    record = {
        "method": method,
        "sources": [{"model": n, "sha256": digests[n], "weight": weight} for n, weight in found.items()],
        "dev": None if dev is None else [str(path) for path in path_list("dev", dev)],
        "split": None if dev is None else split,
        "metric": metric,
        "candidates": candidates,
    }
    with atomic_folder(folder) as temporary:
        towers.save(temporary)
        write_json(temporary / MERGE_FILE, record)
        (temporary / "merge.md").write_text(_report(record), encoding="utf-8")
        write_checksums(temporary)
        write_card(temporary, towers, _card(found, method))
    return Merge(folder, found, metric, score, tuple(candidates))


def _card(weights: dict[str, float], method: Method) -> ModelCard:
    bases = {name: base_model(name) for name in weights}
    parts = ", ".join(f"{base.name} ({weights[name]:.3f})" for name, base in bases.items())
    return ModelCard(
        title="Merged retrieval model",
        summary=f"This model is a merge ({method}) of the weights of {parts}; `{MERGE_FILE}` records it.",
        base_models=tuple(base.hub_name for base in bases.values() if base.hub_name),
        base=", ".join(map(str, bases.values())),
        relation="merge",
        license=common_license(bases.values()),
        environment=versions(*COMPUTING),
    )


class _Search:
    """The search for weights on a dev set.

    Args:
        model: The first model, whose weights are replaced by those of the merges.
        dev: The dev sets.
        method: How weights are interpolated.
        grid: Number of steps between the shares 0 and 1.
        reporter: Shows progress.
    """

    def __init__(self, model: Model, dev: DevConfig, method: Method, grid: int, reporter: Reporter) -> None:
        self._model, self._method, self._grid, self._reporter = model, method, grid, reporter
        dev_set = open_dev_set(dev, images=model.embeds_images)
        assert dev_set is not None
        self._dev_set = dev_set
        self.metric = dev_set.metric
        self._rows: list[dict[str, Any]] = []

    def run(self, states: dict[str, Weights]) -> tuple[list[str], list[float], list[dict[str, Any]]]:
        """Return the order of merging, the weights in this order, and the measures of each merge."""
        scores = {name: self._score(state, {name: 1.0}) for name, state in states.items()}
        # Of equal scores, the order of the arguments.
        order = sorted(states, key=lambda name: -scores[name])
        weights, state, best = {order[0]: 1.0}, states[order[0]], scores[order[0]]
        for name in order[1:]:
            kept, kept_state = weights, state
            for share in (step / self._grid for step in range(1, self._grid)):
                mixed = {**{other: (1 - share) * weight for other, weight in weights.items()}, name: share}
                mixed_state = interpolate(state, states[name], share, self._method)
                if (score := self._score(mixed_state, mixed)) > best:
                    best, kept, kept_state = score, mixed, mixed_state
            weights, state = {name: 0.0, **kept}, kept_state
        return order, [weights[name] for name in order], self._rows

    def _score(self, state: Weights, weights: dict[str, float]) -> float:
        towers = self._model.towers
        towers.model.load_state_dict(state)
        with tempfile.TemporaryDirectory() as folder:
            measures = self._dev_set.measures(
                towers,
                Path(folder) / "dev",
                EncodeOptions(self._model.options.precision, self._model.options.micro_batch_tokens),
                self._reporter,
                loss=torch.nn.Identity(),
                tick=None,
                ranks=Ranks(),
            )
        score = measures[self.metric.lower()]
        self._rows.append({"weights": weights, **measures})
        shown = ", ".join(f"{weight:.2f} {name}" for name, weight in weights.items())
        self._reporter.line(f"{shown}: {self.metric} {score:.4f}")
        return score


def _load_all(names: Sequence[str], reporter: Reporter) -> tuple[Towers, list[Weights], dict[str, str]]:
    """Load all models on the CPU.

    Returns:
        The first model, and the weights and fingerprint of each.
    """
    towers: Towers | None = None
    states: list[Weights] = []
    digests: dict[str, str] = {}
    with reporter.bar("load models", len(names), "models") as advance:
        for name in names:
            loaded = load_any_towers(name)
            if towers is None:
                towers = loaded
            else:
                check_same_architecture(towers, loaded, (names[0], name))
                _note_other_texts(towers, loaded, names[0], name, reporter)
            digests[name] = loaded.fingerprint()["sha256"]
            # Copies, because the first model's weights are replaced.
            states.append({key: tensor.clone() for key, tensor in loaded.model.state_dict().items()})
            advance(1)
    assert towers is not None
    return towers, states, digests


def _note_other_texts(first: Towers, other: Towers, first_name: str, name: str, reporter: Reporter) -> None:
    for side in SIDES:
        pairs = {
            "prompt": (first.prompt(side), other.prompt(side)),
            "maximum length": (first.tokenizer(side).max_length, other.tokenizer(side).max_length),
        }
        for what, (kept, left_out) in pairs.items():
            if kept != left_out:
                reporter.line(
                    f"warning: the {what} of a {side} is that of {first_name}, {kept!r}; {name} has {left_out!r}"
                )


def _checked_weights(names: Sequence[str], weights: Sequence[float] | None, dev: Any) -> list[float]:
    if len(names) < 2:
        raise ArgumentError("models", f"expected two or more models, found {len(names)}")
    if len(set(names)) < len(names):
        raise ArgumentError("models", "expected different models, found one twice")
    if weights is None:
        return [1.0] * len(names)
    if dev is not None:
        raise ArgumentError("weights", "expected none with dev, on which they are chosen")
    found = list(weights)
    if len(found) != len(names):
        raise ArgumentError("weights", f"expected {len(names)}, one for each model, found {len(found)}")
    for weight in found:
        check_numbers(weights=weight)
    if not (all(0 <= weight < float("inf") for weight in found) and sum(found) > 0):
        raise ArgumentError("weights", f"expected numbers of 0 or more with a sum over 0, found {found}")
    return [float(weight) for weight in found]


def _check_out(folder: Path) -> None:
    if folder.exists() and not (folder / MERGE_FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArgumentError("out", f"expected a new or empty folder, or one of a merged model, found {folder}")


def _report(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    sources = [f"| {row['model']} | {row['weight']:.4f} | {row['sha256'][:12]}… |" for row in record["sources"]]
    lines = [f"# Merged model ({record['method']})", "", "| source | weight | sha256 |", "|---|---:|---|", *sources]
    if record["candidates"]:
        names = [name for name in record["candidates"][0] if name != "weights"]
        metric = record["metric"].lower()
        shown = [metric, *(name for name in names if name.endswith(f"_{metric}"))]
        lines += ["", f"Evaluated on {', '.join(record['dev'])}, split {record['split']}:", ""]
        lines += [f"| weights | {' | '.join(shown)} |", f"|---|{'---:|' * len(shown)}"]
        for row in record["candidates"]:
            weights = ", ".join(f"{weight:.2f} {name}" for name, weight in row["weights"].items())
            lines.append(f"| {weights} | {' | '.join(f'{row[name]:.4f}' for name in shown)} |")
    return "\n".join(lines) + "\n"
