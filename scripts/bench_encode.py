"""Encoding a corpus: `retriever encode`'s own path, from text and from tokens, beside sentence-transformers' encode.

    python scripts/bench_encode.py --device cuda --tokenizer FOLDER --passages 400000   BERT-base, random weights
    python scripts/bench_encode.py --device cpu --model FOLDER --passages 2000          MiniLM, say
    python scripts/bench_encode.py --device cpu --memory --passages 10000000            memory over a long corpus

Ours reads JSON lines, tokenizes, embeds and writes the checksummed store; theirs embeds a list in memory, at each of
--their-batches, and the best is the one compared. Our embeddings are held to theirs before our times are printed.
Beside the measured peak of GPU memory stands the planned one (retriever/graph_memory.py). Each row goes to
scripts/results/encode.csv as soon as it is measured, those of --memory to encode_memory.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_train import MIB, RESULTS, Budget, flops, model_config, peak_mib, product_rate, reset_peak, wait, write
from machine import machine
from sized_texts import PASSAGE, SizedTexts

from index.passages import PassageFile, read_passages
from retriever.corpus_windows import WINDOW
from retriever.device import choose_precision
from retriever.encode import EncodeOptions, embed_windows
from retriever.encode_corpus import encode_passages
from retriever.graph_memory import EncodeMemory
from retriever.half_weights import arithmetic
from retriever.tokens import TokenizedTexts
from retriever.towers import Towers, build_towers

# Of the time that is left, for a measurement; the rest goes into files and into tokenizing to count.
FROM_TOKENS, FROM_FILE = 0.2, 0.25

TINY = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 32,
}


def main() -> None:
    """Measure ours and theirs on one corpus and keep the rows."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            memory(options, Path(folder))
        else:
            speed(options, Path(folder))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--model", default="", help="folder of a model; BERT-base with random weights if not given")
    parser.add_argument("--tokenizer", help="folder of a BERT tokenizer, for BERT-base")
    parser.add_argument("--passages", type=int, default=400_000, help="ours")
    parser.add_argument("--their-passages", type=int, default=20_000, help="theirs")
    parser.add_argument("--their-batches", type=int, nargs="+", default=[64, 256, 1024], help="texts a batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="processes that read and tokenize, of ours")
    parser.add_argument("--budget", type=float, help="seconds for all of it, kept to by fewer passages (default: none)")
    parser.add_argument("--memory", action="store_true", help="only show the host's memory while a corpus goes through")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for encode.csv")
    parser.add_argument("--commit", default="", help="of the code, where the checkout is not at hand")
    return parser.parse_args()


def speed(options: argparse.Namespace, folder: Path) -> None:
    """Theirs at each batch size, then ours from tokens and from the file; each row is kept as soon as it is there."""
    budget = Budget(options.budget)
    device = torch.device(options.device)
    towers = build_towers(model_config(options)).to(device).eval()
    texts = SizedTexts(towers.tokenizer("document").tokenizer)
    sample = list(texts.make(PASSAGE, options.their_passages))
    tokens = towers.tokenizer("document")(sample)
    ceiling = product_rate(device)
    about = {**machine(), "commit": options.commit or machine()["commit"], "product_tflops": round(ceiling, 1)}
    table: list[dict[str, Any]] = []
    best = 0.0

    def keep(method: str, passages: int, real: int, seconds: float, planned: float = 0.0) -> None:
        rate = real / seconds
        row = {
            "method": method,
            "passages": passages,
            "tokens": real,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(rate),
            "passages_per_second": round(passages / seconds),
            "times_theirs": round(rate / best, 2) if best else "",
            "flop_utilisation": round(flops(towers) * rate / 1e12 / ceiling, 3),
            "peak_mib": round(peak_mib()),
            "planned_mib": round(planned / MIB) if planned else "",
            **about,
        }
        table.append(row)
        write(options.results / "encode.csv", table)
        print(
            f"{method:36} {rate:12,.0f} tokens/s {row['passages_per_second']:9,} passages/s "
            f"{row['times_theirs']:>6} x theirs  {row['flop_utilisation']:.1%}  {row['peak_mib']:,} MiB"
            + (f" ({row['planned_mib']:,} planned)" if planned else ""),
            flush=True,
        )

    expected = None
    if device.type == "cuda":
        towers.model.bfloat16()
    for batch in options.their_batches:
        reset_peak()
        seconds, expected = sentence_transformers(towers, sample, batch)
        keep(f"sentence-transformers, batch {batch}", len(sample), len(tokens.ids), seconds)
    best = max((row["tokens_per_second"] for row in table), default=0.0)
    towers.model.float()
    if device.type == "cuda":
        assert towers.drop_padding()
    settings = EncodeOptions(precision=choose_precision("auto", device))
    compare(towers, tokens, expected, settings)
    with arithmetic(towers, settings.precision):
        planned = EncodeMemory.plan(towers, texts=len(sample)).peak
    name = f"ours, {settings.precision}"

    # As many passages as there is time for, by the time that the sample takes.
    seconds = from_tokens(towers, tokens, 1, settings)
    repeats = budget.repeats(FROM_TOKENS, seconds, least=1, most=max(1, options.passages // len(sample)))
    reset_peak()
    seconds = from_tokens(towers, tokens, repeats, settings)
    keep(f"{name}, from tokens", repeats * len(sample), repeats * len(tokens.ids), seconds, planned)

    count = len(sample) * budget.repeats(
        FROM_FILE / len(set(options.workers)), seconds / repeats, least=1, most=max(1, options.passages // len(sample))
    )
    with arithmetic(towers, settings.precision):
        planned = EncodeMemory.plan(towers, texts=WINDOW).peak
    real = write_corpus(towers, texts, count, folder / "corpus.jsonl")
    for workers in dict.fromkeys(options.workers):
        reset_peak()
        seconds = from_file(towers, folder / "corpus.jsonl", settings, folder / f"store{workers}", workers)
        by = f", {workers} workers" if workers else ""
        keep(f"{name}, file to store{by}", count, real, seconds, planned)
    print(f"{budget.spent():.0f} s in all", flush=True)


def sentence_transformers(towers: Towers, sample: list[str], batch: int) -> tuple[float, np.ndarray]:
    """Seconds, after a first pass over a tenth, and the embeddings."""

    def encode(texts: list[str]) -> np.ndarray:
        return towers.model.encode_document(texts, batch_size=batch, convert_to_numpy=True)

    encode(sample[: len(sample) // 10])
    wait(towers.device)
    start = time.perf_counter()
    embeddings = encode(sample)
    return time.perf_counter() - start, embeddings.astype(np.float32)


def compare(towers: Towers, tokens: TokenizedTexts, expected: Any, settings: EncodeOptions) -> None:
    """Hold our embeddings to theirs; builds the kernels besides."""
    ((_, found),) = embed_windows(towers, [(None, tokens)], "document", settings)
    if expected is None:
        return
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    worst = float((1 - (found * expected).sum(1) / lengths).max())
    print(f"largest distance of an embedding from theirs: {worst:.1e} (1 - cosine)", flush=True)
    assert worst < 0.02, worst


def from_tokens(towers: Towers, tokens: TokenizedTexts, repeats: int, settings: EncodeOptions) -> float:
    """Seconds from tokens in memory to embeddings in memory."""
    start = time.perf_counter()
    for _ in embed_windows(towers, ((None, tokens) for _ in range(repeats)), "document", settings):
        pass
    return time.perf_counter() - start


def write_corpus(towers: Towers, texts: SizedTexts, count: int, corpus: Path) -> int:
    """A corpus file of so many passages; returns its tokens."""
    tokenizer = towers.tokenizer("document")
    texts.write_corpus(corpus, count)
    passages, real = read_passages(corpus), 0
    while window := [passage.content for passage in itertools.islice(passages, WINDOW)]:
        real += len(tokenizer(window).ids)
    return real


def from_file(towers: Towers, corpus: Path, settings: EncodeOptions, store: Path, workers: int) -> float:
    """The seconds from a corpus file to the checksummed store."""
    source = {"name": "bench"}
    start = time.perf_counter()
    encode_passages(towers, PassageFile(corpus), store, settings, source=source, dtype="float16", workers=workers)
    return time.perf_counter() - start


def memory(options: argparse.Namespace, folder: Path) -> None:
    """The host's memory at every tenth of a corpus of one-line texts, through a tower of one small layer; its rows go
    to encode_memory.csv."""
    import psutil

    model = dataclasses.replace(model_config(options), name="", architecture=TINY, max_length=16)
    towers = build_towers(model).to(options.device).eval()
    corpus = folder / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as stream:
        for number in range(options.passages):
            stream.write(f'{{"_id": "{number}", "text": "passage {number % 1000}"}}\n')
    about = {**machine(), "commit": options.commit or machine()["commit"]}
    size = round(corpus.stat().st_size / MIB)
    step, done = max(1, options.passages // 10), 0
    process = psutil.Process()
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if done // step != (done - count) // step:
            # With the processes that tokenize, whose shared pages count for each.
            family = [process, *process.children(recursive=True)]
            used = [member.memory_info() for member in family]
            resident = sum(each.rss for each in used) / MIB
            # Without the pages of files, libraries among them, which the system takes back when it needs them.
            private = sum(each.rss - each.shared for each in used) / MIB
            row = {"passages": done, "file_mib": size, "resident_mib": round(resident), "private_mib": round(private)}
            rows.append({**row, "processes": len(family), "seconds": round(time.perf_counter() - start), **about})
            write(options.results / "encode_memory.csv", rows)
            print(
                f"{done:12,} passages  {resident:8,.0f} MiB, {private:,.0f} without files  {rows[-1]['seconds']:6} s",
                flush=True,
            )

    encode_passages(
        towers, PassageFile(corpus), folder / "store", EncodeOptions(), source={"name": "bench"}, progress=progress
    )


if __name__ == "__main__":
    main()
