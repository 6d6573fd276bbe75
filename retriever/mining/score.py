"""The public function `retriever.score`, which writes a model's scores of the pairs of a training source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from index.progress import Progress, Reporter, SilentReporter, as_reporter
from retriever.config.sources import PairFormat, SourceConfig
from retriever.data.sources import Example
from retriever.data.table import open_source
from retriever.distributed.context import joined_ranks, rank_device, same_settings
from retriever.encoding.encoder import embed_texts
from retriever.encoding.model import Model, load
from retriever.errors import ArgumentError, check_choice, check_paths
from retriever.mining.cross_encoder import CrossEncoderScorer, is_cross_encoder
from retriever.mining.miner import prompts_of
from retriever.mining.parts import Part, Workplace, example_line
from retriever.utils.device import PrecisionChoice, choose_device, choose_encoding_precision

Kind = Literal["auto", "cross-encoder", "bi-encoder"]
Scores = Callable[[Sequence[Example], Reporter], list[tuple[float, ...]]]


@dataclass(frozen=True)
class ScoredPairs:
    """What `retriever.score` returns.

    Attributes:
        path: The JSON lines file; it can be a training source without changes.
        rows: Number of rows written.
        pairs: Number of scores, one for each positive and negative.
    """

    path: Path
    rows: int
    pairs: int


def score(
    model: Model | str | Path,
    data: str | Path | SourceConfig,
    out: str | Path,
    *,
    kind: Kind = "auto",
    logits: bool = False,
    split: str = "train",
    format: PairFormat = "auto",
    query_column: str = "query",
    positive_column: str = "positive",
    negatives_column: str = "negatives",
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    micro_batch_tokens: int | None = None,
    progress: Progress = None,
) -> ScoredPairs:
    """Write a model's scores of the positives and negatives of every row of a training source, for distillation.

    The file has the rows of the source, with the columns query, positive (a list), negatives (a list) and scores (of
    the positives, then of the negatives). An interrupted call can be repeated: it continues from the folder OUT.work.
    Under torchrun every process calls this function, and the processes share the work.

    Args:
        model: A folder or hub name of a cross-encoder of sentence-transformers, whose scores are its outputs; or a
            model from `retriever.load`, its folder or hub name, whose scores are inner products of embeddings.
        data: A training source, for example the file of `retriever.mine`, or a `SourceConfig`, whose fields replace the
            arguments about the source.
        out: The .jsonl file to write.
        kind: What `model` is. Default: "auto", read from its folder; a hub name needs "cross-encoder" or "bi-encoder".
        logits: Whether scores of a cross-encoder are its outputs before the activation function, as MarginMSE and KL
            expect them. Default: False, after it.
        split: Split of a BEIR folder or a Hugging Face dataset. Default: "train".
        format: Format of the source. Default: "auto".
        query_column: Column of the query. Default: "query".
        positive_column: Column of the positive or a list of positives. Default: "positive".
        negatives_column: Column of the hard negatives. Default: "negatives".
        device: Device, if `model` is a folder or name. Default: "auto".
        precision: As for `retriever.load`, if `model` is a folder or name.
        micro_batch_tokens: As for `retriever.load`, for a bi-encoder.
        progress: Called with a `ProgressEvent` at each step. Default: None.

    Returns:
        The file and the number of its rows and scores.

    Raises:
        InputError: The data or the model cannot be read.
        ConfigError: An argument is invalid.
    """
    check_paths(out=out, **({} if isinstance(data, SourceConfig) else {"data": data}))
    check_choice(get_args(Kind), kind=kind)
    check_choice(get_args(PairFormat), format=format)
    if not isinstance(model, Model):
        check_paths(model=model)
        if kind == "auto" and not Path(model).exists():
            raise ArgumentError("kind", "expected cross-encoder or bi-encoder for a hub name, found auto")
        if kind == "auto":
            kind = "cross-encoder" if is_cross_encoder(str(model)) else "bi-encoder"
    if isinstance(model, Model) and kind == "cross-encoder":
        raise ArgumentError("model", "expected the folder or hub name of a cross-encoder, found a loaded Model")
    if logits and kind != "cross-encoder":
        raise ArgumentError("logits", "expected a cross-encoder with it, found a bi-encoder")
    out = Path(out)
    if out.suffix != ".jsonl" or out.is_dir():
        raise ArgumentError("out", f"expected a .jsonl file, found {out}")
    source = data
    if not isinstance(source, SourceConfig):
        source = SourceConfig(
            str(source),
            format=format,
            split=split,
            query=query_column,
            positive=positive_column,
            negatives=negatives_column,
            # They are replaced.
            scores="",
        )
    if isinstance(model, Model):
        device, precision = str(model.device), model.options.precision
        micro_batch_tokens = model.options.micro_batch_tokens
    given = {"kind": kind, "logits": logits, "precision": precision, "micro_batch_tokens": micro_batch_tokens}
    with joined_ranks(same_settings("score", device, given)) as ranks:
        reporter = as_reporter(progress) if ranks.is_first else SilentReporter()
        workplace = Workplace(out, ranks)
        with workplace.removed_if_unused():
            with ranks.first_rank_first(), reporter.bar(f"read {source.path}", None, "rows") as advance:
                table = open_source(source, workplace.folder / "cache", progress=advance)
            for notice in table.notices:
                reporter.line(f"{source.path}: {notice}")
            if kind == "cross-encoder":
                place = rank_device(choose_device(device))
                of_rows = _cross_encoder_scores(
                    CrossEncoderScorer(str(model), place, choose_encoding_precision(precision, place), logits=logits)
                )
                about: object = str(model)
            else:
                if not isinstance(model, Model):
                    model = load(
                        model,
                        device=device,
                        precision=precision,
                        micro_batch_tokens=micro_batch_tokens,
                        progress=reporter,
                    )
                model.towers.to(rank_device(model.device))
                of_rows, about = _bi_encoder_scores(model, source), model.towers.fingerprint()

            def score_part(start: int, stop: int) -> Part:
                examples = [table[row] for row in range(start, stop)]
                scored = [
                    replace(example, scores=scores)
                    for example, scores in zip(examples, of_rows(examples, reporter), strict=True)
                ]
                pairs = sum(len(example.positives) + len(example.negatives) for example in examples)
                counts = {"rows": len(examples), "pairs": pairs}
                return Part([example_line(example, source) for example in scored], counts)

            prompts = [
                source.query_prompt,
                source.passage_prompt,
                source.query_prompt_column,
                source.passage_prompt_column,
            ]
            identity = {"rows": table.sha256, "model": about, "prompts": prompts, **given}
            counts = workplace.write(len(table), identity, score_part, reporter)
    return ScoredPairs(out, counts["rows"], counts["pairs"])


def _cross_encoder_scores(scorer: CrossEncoderScorer) -> Scores:
    def scores(examples: Sequence[Example], reporter: Reporter) -> list[tuple[float, ...]]:
        pairs = [(row.query, text) for row in examples for text in (*row.positives, *row.negatives)]
        with reporter.bar("score pairs", len(pairs), "pairs") as advance:
            return _by_row(examples, scorer.scores(pairs, advance))

    return scores


def _bi_encoder_scores(model: Model, source: SourceConfig) -> Scores:
    def scores(examples: Sequence[Example], reporter: Reporter) -> list[tuple[float, ...]]:
        with prompts_of(source, model.towers):
            queries = [(row.query_prompt, row.query) for row in examples]
            passages = [(row.passage_prompt, text) for row in examples for text in (*row.positives, *row.negatives)]
            query_rows, query_vectors = _embed(model, queries, "query", reporter)
            passage_rows, passage_vectors = _embed(model, passages, "document", reporter)
        counts = [len(row.positives) + len(row.negatives) for row in examples]
        of_pair = query_vectors[np.repeat(query_rows, counts)].astype(np.float64)
        return _by_row(examples, np.einsum("pd,pd->p", of_pair, passage_vectors[passage_rows].astype(np.float64)))

    return scores


def _embed(
    model: Model, texts: Sequence[tuple[str | None, str]], side: Literal["query", "document"], reporter: Reporter
) -> tuple[np.ndarray, np.ndarray]:
    """Embed distinct (prompt, text); returns the row of each text [texts] and the vectors [rows, D]."""
    numbers: dict[tuple[str | None, str], int] = {}
    rows = np.array([numbers.setdefault(text, len(numbers)) for text in texts], np.int64)
    vectors = np.empty((len(numbers), model.dimension), np.float32)
    name = "encode queries" if side == "query" else "encode passages"
    with reporter.bar(name, len(numbers), "texts") as advance:
        for prompt in dict.fromkeys(prompt for prompt, _ in numbers):
            own = [text for text in numbers if text[0] == prompt]
            embedded = embed_texts(model.towers, [text for _, text in own], side, model.options, advance, prompt=prompt)
            vectors[[numbers[text] for text in own]] = embedded
    return rows, vectors


def _by_row(examples: Sequence[Example], scores: np.ndarray) -> list[tuple[float, ...]]:
    ends = np.cumsum([len(row.positives) + len(row.negatives) for row in examples])
    return [tuple(part.tolist()) for part in np.split(scores.astype(np.float32), ends[:-1])]
