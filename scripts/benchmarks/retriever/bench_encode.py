"""Encoding throughput: `retriever encode` against sentence-transformers.

    python scripts/benchmarks/retriever/bench_encode.py --device cuda --tokenizer FOLDER --passages 200000
    python scripts/benchmarks/retriever/bench_encode.py --device cpu --model FOLDER --passages 2000
    python scripts/benchmarks/retriever/bench_encode.py --device cpu --memory --passages 10000000

Without --model both encode with BERT-base and random weights. Ours reads JSON lines, tokenizes, embeds and writes the
checksummed store; sentence-transformers embeds a list in memory. Both embed the same texts, after a first pass over a
tenth of them. sentence-transformers is tried on that tenth at each of --their-batches, with padding and, where
flash-attention is installed, without; its best setting is measured on all texts. Our embeddings are compared with
theirs before our times are printed. The planned peak memory is that of models/memory.py.

--memory prints and stores the memory of the process over a long corpus instead. Rows are written to encode.csv as they
are measured, those of --memory to encode_memory.csv.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from index.passages import PassageFile
from retriever.encoding.corpus import StoreOptions, encode_passages
from retriever.encoding.encoder import EncodeOptions, embed_windows
from retriever.encoding.windows import WINDOW
from retriever.models.memory import EncodeMemory
from retriever.models.mixed_precision import mixed_precision
from retriever.models.modality import build_towers
from retriever.models.tokenizer import TokenizedTexts
from retriever.models.towers import Towers
from retriever.utils.device import choose_precision
from scripts import RESULTS
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows
from scripts.benchmarks.retriever.bench_train import (
    PADDED,
    flops,
    model_config,
    product_rate,
    their_attention,
    with_attention,
)
from scripts.benchmarks.timing import MIB, peak_mib, reset_peak_memory, synchronize
from scripts.datasets.sized_texts import PASSAGE, SizedTexts

TINY = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 32,
}


def main() -> None:
    """Measure one corpus and write the rows."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            memory(options, Path(folder))
        else:
            speed(options, Path(folder))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--model", default="", help="model folder (default: BERT-base with random weights)")
    parser.add_argument("--tokenizer", help="folder of a BERT tokenizer for BERT-base")
    parser.add_argument("--passages", type=int, default=200_000, help="number of passages (default: %(default)s)")
    parser.add_argument(
        "--their-batches",
        type=int,
        nargs="*",
        default=[64, 256, 1024],
        help="batch sizes of sentence-transformers in texts; none: it is left out (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0], help="our reader and tokenizer processes (default: %(default)s)"
    )
    parser.add_argument(
        "--memory", action="store_true", help="measure the memory over a long corpus instead of the speed"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the CSV files (default: %(default)s)")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    return parser.parse_args()


def speed(options: argparse.Namespace, folder: Path) -> None:
    """Measure sentence-transformers at each batch size, then ours from tokens and from a file."""
    start = time.perf_counter()
    device = torch.device(options.device)
    towers = build_towers(model_config(options)).to(device).eval()
    texts = SizedTexts(towers.tokenizer("document").tokenizer)
    sample = list(texts.make(PASSAGE, options.passages))
    few = sample[: max(1, len(sample) // 10)]
    ceiling = product_rate(device)
    about = {**machine(options.commit), "product_tflops": round(ceiling, 1)}
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
        update_rows(table, options.results / "encode.csv", key=["hardware"])
        print(
            f"{method:36} {rate:12,.0f} tokens/s {row['passages_per_second']:9,} passages/s "
            f"{row['times_theirs']:>6} × theirs  {row['flop_utilisation']:.1%}  {row['peak_mib']:,} MiB"
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
        reset_peak_memory()
        seconds, expected = sentence_transformers(with_attention(towers.model, attention), sample, batch, few)
        keep(their_name(attention, batch), len(sample), len(tokens.ids), seconds)
        best = table[0]["tokens_per_second"]
    towers.model.float()
    if device.type == "cuda":
        assert towers.enable_packing()
    settings = EncodeOptions(precision=choose_precision("auto", device))
    compare(towers, tokens, expected, settings)
    with mixed_precision(towers, settings.precision):
        planned = EncodeMemory.plan(towers, texts=len(sample)).peak
    name = f"ours, {settings.precision}"

    reset_peak_memory()
    seconds = from_tokens(towers, tokens, settings)
    keep(f"{name}, from tokens", len(sample), len(tokens.ids), seconds, planned)

    with mixed_precision(towers, settings.precision):
        planned = EncodeMemory.plan(towers, texts=WINDOW).peak
    for part, some in (("few", few), ("all", sample)):
        write_corpus(some, folder / f"{part}.jsonl")
    for workers in dict.fromkeys(options.workers):
        from_file(towers, folder / "few.jsonl", settings, folder / f"few{workers}", workers)
        reset_peak_memory()
        seconds = from_file(towers, folder / "all.jsonl", settings, folder / f"store{workers}", workers)
        by = f", {workers} workers" if workers else ""
        keep(f"{name}, file to store{by}", len(sample), len(tokens.ids), seconds, planned)
    print(f"{time.perf_counter() - start:.0f} s in total", flush=True)


def their_name(attention: str, batch: int) -> str:
    """Method name of a row of sentence-transformers."""
    return f"sentence-transformers, batch {batch}" + (", without padding" if attention != PADDED else "")


def sentence_transformers(network: Any, sample: list[str], batch: int, first: list[str]) -> tuple[float, np.ndarray]:
    """Seconds to encode `sample` after a pass over `first`, and the embeddings."""

    def encode(texts: list[str]) -> np.ndarray:
        return network.encode_document(texts, batch_size=batch, convert_to_numpy=True)

    encode(first)
    synchronize(network.device)
    start = time.perf_counter()
    embeddings = encode(sample)
    return time.perf_counter() - start, embeddings.astype(np.float32)


def compare(towers: Towers, tokens: TokenizedTexts, expected: Any, settings: EncodeOptions) -> None:
    """Check our embeddings against the expected ones. Also compiles the kernels."""
    ((_, found),) = embed_windows(towers, [(None, tokens)], "document", settings)
    if expected is None:
        return
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    worst = float((1 - (found * expected).sum(1) / lengths).max())
    print(f"largest cosine distance from their embeddings: {worst:.1e}", flush=True)
    assert worst < 0.02, worst


def from_tokens(towers: Towers, tokens: TokenizedTexts, settings: EncodeOptions) -> float:
    """Seconds from tokens in memory to embeddings in memory."""
    start = time.perf_counter()
    for _ in embed_windows(towers, [(None, tokens)], "document", settings):
        pass
    return time.perf_counter() - start


def write_corpus(texts: list[str], corpus: Path) -> None:
    """Write the passages to a JSON lines file."""
    with corpus.open("w", encoding="utf-8") as stream:
        for number, text in enumerate(texts):
            stream.write(json.dumps({"_id": str(number), "text": text}) + "\n")


def from_file(towers: Towers, corpus: Path, settings: EncodeOptions, store: Path, workers: int) -> float:
    """Seconds from a corpus file to the checksummed store."""
    source = {"name": "bench"}
    start = time.perf_counter()
    storage = StoreOptions(dtype="float16", workers=workers)
    encode_passages(towers, PassageFile(corpus), store, settings, source=source, storage=storage)
    return time.perf_counter() - start


def memory(options: argparse.Namespace, folder: Path) -> None:
    """Measure the memory of the process at every tenth of a corpus of one-line texts, encoded by a tower of one small
    layer. Rows are written to encode_memory.csv."""
    import psutil

    model = dataclasses.replace(model_config(options), name="", architecture=TINY, max_length=16)
    towers = build_towers(model).to(options.device).eval()
    corpus = folder / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as stream:
        for number in range(options.passages):
            stream.write(f'{{"_id": "{number}", "text": "passage {number % 1000}"}}\n')
    about = machine(options.commit)
    size = round(corpus.stat().st_size / MIB)
    step, done = max(1, options.passages // 10), 0
    process = psutil.Process()
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if done // step != (done - count) // step:
            # Tokenizer processes are included; pages that they share count once per process.
            family = [process, *process.children(recursive=True)]
            used = [member.memory_info() for member in family]
            resident = sum(each.rss for each in used) / MIB
            # Without file-backed pages, libraries included, which the system can evict.
            private = sum(each.rss - each.shared for each in used) / MIB
            row = {"passages": done, "file_mib": size, "resident_mib": round(resident), "private_mib": round(private)}
            rows.append({**row, "processes": len(family), "seconds": round(time.perf_counter() - start), **about})
            update_rows(rows, options.results / "encode_memory.csv", key=["hardware"])
            print(
                f"{done:12,} passages  {resident:8,.0f} MiB, {private:,.0f} private  {rows[-1]['seconds']:6} s",
                flush=True,
            )

    encode_passages(
        towers, PassageFile(corpus), folder / "store", EncodeOptions(), source={"name": "bench"}, progress=progress
    )


if __name__ == "__main__":
    main()
