"""Encoding a corpus: `retriever encode`'s own path, from text and from tokens, beside sentence-transformers' encode.

    python scripts/bench_encode.py --device cuda --tokenizer FOLDER --passages 400000   BERT-base, random weights
    python scripts/bench_encode.py --device cpu --model FOLDER --passages 2000          MiniLM, say
    python scripts/bench_encode.py --device cpu --memory --passages 10000000            memory over a long corpus

Ours reads JSON lines, tokenizes, embeds and writes the checksummed store; theirs embeds a list in memory, at each of
--their-batches, and the best is the one compared. Embeddings of both are compared before a time is printed. Rows go to
scripts/results/encode.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_train import RESULTS, flops, model_config, peak_mib, product_rate, reset_peak, wait, write
from machine import machine
from sized_texts import PASSAGE, SizedTexts

from index.passages import read_passages
from retriever.device import choose_precision
from retriever.encode import EncodeOptions, embed_windows, encode_passages
from retriever.padding_free.families import drop_padding
from retriever.towers import Towers, build_towers

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
    parser.add_argument("--memory", action="store_true", help="only show the host's memory while a corpus goes through")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for encode.csv")
    parser.add_argument("--commit", default="", help="of the code, where the checkout is not at hand")
    return parser.parse_args()


def speed(options: argparse.Namespace, folder: Path) -> None:
    device = torch.device(options.device)
    towers = build_towers(model_config(options)).to(device).eval()
    texts = SizedTexts(towers.tokenizer("document").tokenizer)
    sample = list(texts.make(PASSAGE, options.their_passages))
    real = int(towers.tokenizer("document")(sample).lengths.sum())
    ceiling = product_rate(device)
    rows = []
    expected = None
    if device.type == "cuda":
        towers.model.bfloat16()
    for batch in options.their_batches:
        seconds, expected = sentence_transformers(towers, sample, batch)
        rows.append(
            {
                "method": f"sentence-transformers, batch {batch}",
                "passages": len(sample),
                "tokens": real,
                "seconds": seconds,
            }
        )
    towers.model.float()
    if device.type == "cuda":
        assert drop_padding(towers.model)
        towers.padding_free = True
    settings = EncodeOptions(precision=choose_precision("auto", device))
    rows += ours(towers, texts, sample, expected, settings, options.passages, folder)
    best = max(row["tokens"] / row["seconds"] for row in rows[: len(options.their_batches)])
    about = {**machine(), "commit": options.commit or machine()["commit"], "product_tflops": round(ceiling, 1)}
    table = []
    for row in rows:
        rate = row["tokens"] / row["seconds"]
        used = flops(towers) * rate / 1e12 / ceiling
        table.append(
            {
                **row,
                "seconds": round(row["seconds"], 3),
                "tokens_per_second": round(rate),
                "passages_per_second": round(row["passages"] / row["seconds"]),
                "times_theirs": round(rate / best, 2),
                "flop_utilisation": round(used, 3),
                **about,
            }
        )
        passages = row["passages"] / row["seconds"]
        print(
            f"{row['method']:36} {rate:12,.0f} tokens/s {passages:9,.0f} passages/s "
            f"{rate / best:6.2f} x theirs {used:.1%}",
            flush=True,
        )
    write(options.results / "encode.csv", table)


def sentence_transformers(towers: Towers, sample: list[str], batch: int) -> tuple[float, np.ndarray]:
    """Seconds, after a first pass over a tenth, and the embeddings."""

    def encode(texts: list[str]) -> np.ndarray:
        return towers.model.encode_document(texts, batch_size=batch, convert_to_numpy=True)

    encode(sample[: len(sample) // 10])
    wait(towers.device)
    start = time.perf_counter()
    embeddings = encode(sample)
    return time.perf_counter() - start, embeddings.astype(np.float32)


def ours(
    towers: Towers,
    texts: SizedTexts,
    sample: list[str],
    expected: Any,
    settings: EncodeOptions,
    count: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """From the file to the store, and from tokens to memory; kernels are built before the clock starts."""
    tokenizer = towers.tokenizer("document")
    tokens = tokenizer(sample)
    ((_, found),) = embed_windows(towers, [(None, tokens)], "document", settings)
    worst = float(
        (1 - (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)).max()
    )
    print(f"largest distance of an embedding from theirs: {worst:.1e} (1 - cosine)", flush=True)
    assert worst < 0.02, worst
    reset_peak()
    start = time.perf_counter()
    repeats = max(1, count // len(sample))
    for _ in embed_windows(towers, ((None, tokens) for _ in range(repeats)), "document", settings):
        pass
    seconds = time.perf_counter() - start
    name = f"ours, {settings.precision}"
    from_tokens = {
        "method": f"{name}, from tokens",
        "passages": repeats * len(sample),
        "tokens": repeats * len(tokens.ids),
        "seconds": seconds,
    }

    corpus = folder / "corpus.jsonl"
    texts.write_corpus(corpus, count)
    real = int(tokenizer([passage.content for passage in read_passages(corpus)]).lengths.sum())
    start = time.perf_counter()
    encode_passages(
        towers, read_passages(corpus), folder / "store", settings, source={"name": "bench"}, dtype="float16"
    )
    seconds = time.perf_counter() - start
    print(f"peak of our encoding {peak_mib():,.0f} MiB of GPU memory", flush=True)
    return [from_tokens, {"method": f"{name}, file to store", "passages": count, "tokens": real, "seconds": seconds}]


def memory(options: argparse.Namespace, folder: Path) -> None:
    """The host's memory at every tenth of a corpus of one-line texts, through a tower of one small layer."""
    import psutil

    model = dataclasses.replace(model_config(options), architecture=TINY, max_length=16)
    towers = build_towers(model).to(options.device).eval()
    corpus = folder / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as stream:
        for number in range(options.passages):
            stream.write(f'{{"_id": "{number}", "text": "passage {number % 1000}"}}\n')
    step, done = options.passages // 10, 0
    process = psutil.Process()
    start = time.perf_counter()

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if done // step != (done - count) // step:
            resident, seconds = process.memory_info().rss / 2**20, time.perf_counter() - start
            print(f"{done:12,} passages  {resident:8,.0f} MiB  {seconds:6.0f} s", flush=True)

    encode_passages(
        towers, read_passages(corpus), folder / "store", EncodeOptions(), source={"name": "bench"}, progress=progress
    )


if __name__ == "__main__":
    main()
