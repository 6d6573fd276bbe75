"""Encoding a corpus: `retriever encode`'s own path, from text and from tokens, beside sentence-transformers' encode.

    python scripts/bench_encode.py --device cuda --tokenizer FOLDER --passages 200000   BERT-base, random weights
    python scripts/bench_encode.py --device cpu --model FOLDER --passages 2000          MiniLM, say
    python scripts/bench_encode.py --device cpu --memory --passages 10000000            memory over a long corpus

Ours reads JSON lines, tokenizes, embeds and writes the checksummed store; theirs embeds a list in memory. Both embed
the same texts, after a first pass over a tenth of them. Theirs is tried on that tenth at each of --their-batches,
padded, and without padding where flash-attention is installed; its best setting is measured on all. Our embeddings are
held to theirs before our times are printed. Beside the measured peak of GPU memory stands the planned one
(models/memory.py). Each row goes to scripts/results/encode.csv as soon as it is measured, those of --memory to
encode_memory.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_train import (
    MIB,
    PADDED,
    RESULTS,
    flops,
    model_config,
    peak_mib,
    product_rate,
    reset_peak,
    their_attention,
    wait,
    with_attention,
    write,
)
from machine import machine
from sized_texts import PASSAGE, SizedTexts

from index.passages import PassageFile
from retriever.encoding.corpus import StoreOptions, encode_passages
from retriever.encoding.encoder import EncodeOptions, embed_windows
from retriever.encoding.windows import WINDOW
from retriever.models.memory import EncodeMemory
from retriever.models.mixed_precision import arithmetic
from retriever.models.tokenizer import TokenizedTexts
from retriever.models.towers import Towers, build_towers
from retriever.utils.device import choose_precision

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
    parser.add_argument("--passages", type=int, default=200_000, help="of both")
    parser.add_argument("--their-batches", type=int, nargs="+", default=[64, 256, 1024], help="texts a batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0], help="processes that read and tokenize, of ours")
    parser.add_argument("--memory", action="store_true", help="only show the host's memory while a corpus goes through")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for encode.csv")
    parser.add_argument("--commit", default="", help="of the code, where the checkout is not at hand")
    return parser.parse_args()


def speed(options: argparse.Namespace, folder: Path) -> None:
    """Theirs at each batch size, then ours from tokens and from the file; each row is kept as soon as it is there."""
    start = time.perf_counter()
    device = torch.device(options.device)
    towers = build_towers(model_config(options)).to(device).eval()
    texts = SizedTexts(towers.tokenizer("document").tokenizer)
    sample = list(texts.make(PASSAGE, options.passages))
    few = sample[: max(1, len(sample) // 10)]
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

    tokens = towers.tokenizer("document")(sample)
    expected = None
    if device.type == "cuda":
        towers.model.bfloat16()
    tried: dict[float, tuple[str, int]] = {}
    for attention in their_attention(device) if options.their_batches else []:
        network = with_attention(towers.model, attention)
        for batch in options.their_batches:
            seconds, _ = sentence_transformers(network, few, batch, few[: len(few) // 4])
            tried[seconds] = attention, batch
            print(f"{their_name(attention, batch)}: {seconds:.2f} s for {len(few):,} passages", flush=True)
        del network
    if tried:
        attention, batch = tried[min(tried)]
        reset_peak()
        seconds, expected = sentence_transformers(with_attention(towers.model, attention), sample, batch, few)
        keep(their_name(attention, batch), len(sample), len(tokens.ids), seconds)
        best = table[0]["tokens_per_second"]
    towers.model.float()
    if device.type == "cuda":
        assert towers.drop_padding()
    settings = EncodeOptions(precision=choose_precision("auto", device))
    compare(towers, tokens, expected, settings)
    with arithmetic(towers, settings.precision):
        planned = EncodeMemory.plan(towers, texts=len(sample)).peak
    name = f"ours, {settings.precision}"

    reset_peak()
    seconds = from_tokens(towers, tokens, settings)
    keep(f"{name}, from tokens", len(sample), len(tokens.ids), seconds, planned)

    with arithmetic(towers, settings.precision):
        planned = EncodeMemory.plan(towers, texts=WINDOW).peak
    for part, some in (("few", few), ("all", sample)):
        write_corpus(some, folder / f"{part}.jsonl")
    for workers in dict.fromkeys(options.workers):
        from_file(towers, folder / "few.jsonl", settings, folder / f"few{workers}", workers)
        reset_peak()
        seconds = from_file(towers, folder / "all.jsonl", settings, folder / f"store{workers}", workers)
        by = f", {workers} workers" if workers else ""
        keep(f"{name}, file to store{by}", len(sample), len(tokens.ids), seconds, planned)
    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)


def their_name(attention: str, batch: int) -> str:
    """How a row of theirs is called."""
    return f"sentence-transformers, batch {batch}" + (", without padding" if attention != PADDED else "")


def sentence_transformers(network: Any, sample: list[str], batch: int, first: list[str]) -> tuple[float, np.ndarray]:
    """Seconds, after a pass over `first`, and the embeddings."""

    def encode(texts: list[str]) -> np.ndarray:
        return network.encode_document(texts, batch_size=batch, convert_to_numpy=True)

    encode(first)
    wait(network.device)
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


def from_tokens(towers: Towers, tokens: TokenizedTexts, settings: EncodeOptions) -> float:
    """Seconds from tokens in memory to embeddings in memory."""
    start = time.perf_counter()
    for _ in embed_windows(towers, [(None, tokens)], "document", settings):
        pass
    return time.perf_counter() - start


def write_corpus(texts: list[str], corpus: Path) -> None:
    """A JSON-lines file of these passages."""
    with corpus.open("w", encoding="utf-8") as stream:
        for number, text in enumerate(texts):
            stream.write(json.dumps({"_id": str(number), "text": text}) + "\n")


def from_file(towers: Towers, corpus: Path, settings: EncodeOptions, store: Path, workers: int) -> float:
    """The seconds from a corpus file to the checksummed store."""
    source = {"name": "bench"}
    start = time.perf_counter()
    storage = StoreOptions(dtype="float16", workers=workers)
    encode_passages(towers, PassageFile(corpus), store, settings, source=source, storage=storage)
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
