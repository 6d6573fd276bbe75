"""Throughput of reading images from webdataset tars, against the JPEG decoder alone on the same cores.

    python scripts/benchmarks/retriever/bench_images.py
    python scripts/benchmarks/retriever/bench_images.py --data 'cc3m-{00000..00003}.tar' --workers 16

Without --data the images are SYNTHETIC: smooth random fields with noise, as JPEG files of the usual size of web
collections. Rounds of the methods alternate in one process. All methods read the same images, from the page cache:

- Pillow: JPEG bytes in memory are decoded to RGB, in --workers processes.
- decoder: a random crop of each is also resized and copied to a tensor, with Pillow and torch only.
- pipeline: that of `retriever train`: tars are read by offset, captions drawn and tokenized, batches assembled.

Besides the rates, the processor time per image over all processes is reported: other load on the machine slows the
rates but hardly changes it. Rows are written to images.csv.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from index.files import InputError
from retriever.config.images import ImageSource
from retriever.data.images.batches import ImageBatches, MicroBatchSettings
from retriever.data.images.chunks import PairReader
from retriever.data.images.sources import PairSource, open_pairs
from retriever.data.schedules.schedule import BatchSchedule
from retriever.models.images.transforms import ImageTransform, random_crop
from retriever.models.tokenizer import TextTokenizer
from scripts import RESULTS
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import write_rows

# Warm-up batches.
WARM_UP = 6
TRANSFORM = ImageTransform(size=(224, 224), resize=224)
WORDS = ["a", "photo", "of", "the", "small", "red", "house", "by", "river", "with", "two", "trees", "and", "sky"]


class SecondsPerImage(NamedTuple):
    """Seconds per image."""

    wall: float
    cpu: float
    """Processor time, over all processes."""


def main() -> None:
    """Measure every method in every round."""
    options = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = options.data or write_tars(Path(folder) / "set", options)
        source = ImageSource(path)
        pairs = open_pairs(source, Path(folder) / "cache", workers=options.workers)
        count = min(options.images, len(pairs)) // options.batch * options.batch
        if not count:
            sys.exit(f"{path}: expected at least a batch of {options.batch} pairs, found {len(pairs)}")
        methods: dict[str, Callable[[], SecondsPerImage]] = {
            "Pillow": lambda: decoder(pairs, count, options.workers, decode),
            "decoder": lambda: decoder(pairs, count, options.workers, decode_and_crop),
            "pipeline": lambda: pipeline(pairs, count, options),
        }
        found: dict[str, list[SecondsPerImage]] = {name: [] for name in methods}
        for number in range(options.rounds + 1):
            for name in sorted(methods, reverse=bool(number % 2)):
                spent = methods[name]()
                # Round 0 is a warm-up.
                if number:
                    found[name].append(spent)
            if number:
                last = {name: spent[-1] for name, spent in found.items()}
                shown = (f"{name} {1 / spent.wall:,.0f}/s {1000 * spent.cpu:.2f} ms" for name, spent in last.items())
                print("  ".join(shown), flush=True)
        size = np.mean([len(pairs.read(row).image) for row in range(0, count, 16)])
    write(found, count, size, options)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__ or "", "images.csv")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="decoding processes (default: one per core)"
    )
    parser.add_argument("--images", type=int, default=2048, help="images per round (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="pairs per batch (default: %(default)s)")
    return parser.parse_args()


def argument_parser(description: str, file: str) -> argparse.ArgumentParser:
    """The arguments of the benchmarks that read images; `file` is where the results are written."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="brace pattern of webdataset tars (default: synthetic ones)")
    parser.add_argument(
        "--sides",
        type=int,
        nargs=2,
        default=(512, 384),
        help="width and height of synthetic images (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder for {file} (default: %(default)s)")
    parser.add_argument("--commit", default="", help="commit of the code, for a copy without git")
    return parser


def write_tars(folder: Path, options: argparse.Namespace) -> str:
    """Write images with captions to two tars; returns their brace pattern."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(options.images // 2):
                words = rng.choice(WORDS, size=rng.integers(5, 20))
                for kind, content in (("jpg", jpeg(options.sides, rng)), ("txt", " ".join(words).encode())):
                    member = tarfile.TarInfo(f"{number:06}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "{0..1}.tar")


def jpeg(sides: tuple[int, int], rng: np.random.Generator) -> bytes:
    """A JPEG of quality 95, which img2dataset writes."""
    few = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    coarse = few.resize(sides, Image.Resampling.BICUBIC)
    noise = rng.normal(0, 4, (sides[1], sides[0], 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def decoder(pairs: PairSource, count: int, workers: int, work: Callable[[list[bytes]], None]) -> SecondsPerImage:
    """Run `work` on all images in several processes, timed from when each process holds its share in memory."""
    context = get_context("fork")
    ready, go = context.Barrier(workers + 1), context.Barrier(workers + 1)
    seconds = context.Array("d", workers)

    def one(number: int) -> None:
        torch.set_num_threads(1)
        share = [pairs.read(row).image for row in range(number, count, workers)]
        ready.wait()
        go.wait()
        before = time.process_time()
        work(share)
        seconds[number] = time.process_time() - before

    processes = [context.Process(target=one, args=(number,)) for number in range(workers)]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    go.wait()
    for process in processes:
        process.join()
    return SecondsPerImage((time.perf_counter() - start) / count, sum(seconds) / count)


def decode(share: list[bytes]) -> None:
    """Decode with Pillow."""
    for content in share:
        Image.open(io.BytesIO(content)).convert("RGB")


def decode_and_crop(share: list[bytes]) -> None:
    """Decode, and convert a random crop of each image to a tensor."""
    rng = np.random.default_rng(0)
    for content in share:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        part = image.crop(random_crop(*image.size, rng)).resize(TRANSFORM.size, Image.Resampling.BICUBIC)
        torch.from_numpy(np.array(part)).permute(2, 0, 1).contiguous()


def processor_seconds() -> float:
    """Processor seconds of this process and its living children."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children())]
    return sum(spent.user + spent.system for spent in times)


def pipeline(pairs: PairSource, count: int, options: argparse.Namespace) -> SecondsPerImage:
    """Time the batches in the middle of a run, whose workers are equally far ahead at the start and at the end."""
    measured = count // options.batch
    schedule = BatchSchedule([len(pairs)], batch_size=options.batch, seed=0, steps=2 * measured + 100)
    reader = PairReader(pairs, TRANSFORM, True, word_tokenizer(), "", 0.01)
    batches = ImageBatches(
        [reader],
        schedule,
        MicroBatchSettings(image_tokens=197, token_budget=131072, padded=False, device="cuda"),
        report=print,
    )
    stream = batches.loader(workers=options.workers)
    for _ in islice(stream, WARM_UP):
        pass
    start, before = time.perf_counter(), processor_seconds()
    seen = sum(batch.queries for batch in islice(stream, measured))
    spent = SecondsPerImage((time.perf_counter() - start) / seen, (processor_seconds() - before) / seen)
    stream.close()
    return spent


def word_tokenizer() -> TextTokenizer:
    """A tokenizer of whole words, which costs as much as any fast tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"), 77)


def write(found: dict[str, list[SecondsPerImage]], count: int, size: Any, options: argparse.Namespace) -> None:
    """Write a row for each method."""
    rows = []
    about = machine(options.commit)
    for name, spent in found.items():
        both = list(zip(found["decoder"], spent, strict=True))
        rows.append(
            {
                "method": name,
                "images_per_second": f"{statistics.median(1 / one.wall for one in spent):.0f}",
                "of_decoder": f"{statistics.median(bare.wall / one.wall for bare, one in both):.3f}",
                "processor_ms": f"{1000 * statistics.median(one.cpu for one in spent):.3f}",
                "of_decoder_by_processor_time": f"{statistics.median(bare.cpu / one.cpu for bare, one in both):.3f}",
                "rounds": options.rounds,
                "images": count,
                "workers": options.workers,
                "data": "given" if options.data else "synthetic JPEG, {} x {}, quality 95".format(*options.sides),
                "mean_bytes": f"{size:.0f}",
                "pillow": Image.__version__,
                **about,
            }
        )
    for row in rows:
        print(
            f"{row['method']:9} {row['images_per_second']:>6}/s, {row['of_decoder']} of the decoder; "
            f"{row['processor_ms']} ms of processor time, {row['of_decoder_by_processor_time']} of the decoder"
        )
    write_rows(rows, options.results / "images.csv")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"bench_images: {error}")
