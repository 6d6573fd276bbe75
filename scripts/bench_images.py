"""How fast pictures come out of webdataset tars, beside what the decoder alone does on the same cores.

    python scripts/bench_images.py
    python scripts/bench_images.py --data 'cc3m-{00000..00003}.tar' --workers 16

Without --data the pictures are SYNTHETIC: smooth random fields with noise, as JPEG of the size that web collections are
kept in. Rounds of each method alternate in one process; all read and decode the same pictures, from the page cache:
- Pillow: JPEG bytes that lie in memory become RGB, in as many processes; nothing else;
- decoder: and a random part of each is cut out, resized and copied to a tensor, by Pillow and torch alone;
- pipeline: `retriever train`'s own: tars read by offset, captions drawn and tokenized, batches put together.
Beside the rates stands the processor time of a picture, over all processes: what else a machine does slows the rates,
and by chance, but hardly that.
Rows go to images.csv in scripts/results or where --results says.
"""

from __future__ import annotations

import argparse
import csv
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from machine import machine

from index.files import InputError, atomic_path
from retriever.config.images import ImageSource
from retriever.data.images.batches import ImageBatches, MicroBatchSettings
from retriever.data.images.chunks import PairReader
from retriever.data.images.sources import PairSource, open_pairs
from retriever.data.schedule import BatchSchedule
from retriever.models.images.transforms import ImageTransform, random_crop
from retriever.models.tokenizer import TextTokenizer

# Batches before the clock starts.
WARM = 6
TRANSFORM = ImageTransform(size=(224, 224), resize=224)
WORDS = ["a", "photo", "of", "the", "small", "red", "house", "by", "river", "with", "two", "trees", "and", "sky"]


class Spent(NamedTuple):
    """Seconds of a picture."""

    wall: float
    busy: float
    """Of processors, over all processes."""


def main() -> None:
    """Measure every method in every round."""
    options = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = options.data or write_tars(Path(folder) / "set", options)
        source = ImageSource(path)
        pairs = open_pairs(source, Path(folder) / "cache", workers=options.workers)
        count = min(options.pictures, len(pairs)) // options.batch * options.batch
        if not count:
            sys.exit(f"{path}: expected at least a batch of {options.batch} pairs, found {len(pairs)}")
        methods: dict[str, Callable[[], Spent]] = {
            "Pillow": lambda: decoder(pairs, count, options.workers, decode),
            "decoder": lambda: decoder(pairs, count, options.workers, decode_and_crop),
            "pipeline": lambda: pipeline(pairs, count, options),
        }
        found: dict[str, list[Spent]] = {name: [] for name in methods}
        for number in range(options.rounds + 1):
            for name in sorted(methods, reverse=bool(number % 2)):
                spent = methods[name]()
                # The first round warms up.
                if number:
                    found[name].append(spent)
            if number:
                last = {name: spent[-1] for name, spent in found.items()}
                shown = (f"{name} {1 / spent.wall:,.0f}/s {1000 * spent.busy:.2f} ms" for name, spent in last.items())
                print("  ".join(shown), flush=True)
        size = np.mean([len(pairs.read(row).image) for row in range(0, count, 16)])
    write(found, count, size, options)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="webdataset tars, with braces; synthetic ones if not given")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that decode")
    parser.add_argument("--pictures", type=int, default=2048, help="pictures a round")
    parser.add_argument("--batch", type=int, default=256, help="pairs of a batch")
    parser.add_argument("--sides", type=int, nargs=2, default=(512, 384), help="of synthetic pictures, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--commit", default="", help="of the code, where the checkout is not at hand")
    return parser.parse_args()


def write_tars(folder: Path, options: argparse.Namespace) -> str:
    """Pictures with captions in two tars; what names them."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(options.pictures // 2):
                words = chance.choice(WORDS, size=chance.integers(5, 20))
                for kind, content in (("jpg", picture(options.sides, chance)), ("txt", " ".join(words).encode())):
                    member = tarfile.TarInfo(f"{number:06}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder / "{0..1}.tar")


def picture(sides: tuple[int, int], chance: np.random.Generator) -> bytes:
    """A JPEG of quality 95, as img2dataset keeps them."""
    few = Image.fromarray(chance.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    coarse = few.resize(sides, Image.Resampling.BICUBIC)
    noise = chance.normal(0, 4, (sides[1], sides[0], 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def decoder(pairs: PairSource, count: int, workers: int, work: Callable[[list[bytes]], None]) -> Spent:
    """What processes take to do `work` on all pictures, from when each of them holds its share."""
    context = get_context("fork")
    ready, go = context.Barrier(workers + 1), context.Barrier(workers + 1)
    taken = context.Array("d", workers)

    def one(number: int) -> None:
        torch.set_num_threads(1)
        share = [pairs.read(row).image for row in range(number, count, workers)]
        ready.wait()
        go.wait()
        before = time.process_time()
        work(share)
        taken[number] = time.process_time() - before

    processes = [context.Process(target=one, args=(number,)) for number in range(workers)]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    go.wait()
    for process in processes:
        process.join()
    return Spent((time.perf_counter() - start) / count, sum(taken) / count)


def decode(share: list[bytes]) -> None:
    """Pillow alone."""
    for content in share:
        Image.open(io.BytesIO(content)).convert("RGB")


def decode_and_crop(share: list[bytes]) -> None:
    """And a random part of each as a tensor."""
    chance = np.random.default_rng(0)
    for content in share:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        part = image.crop(random_crop(*image.size, chance)).resize(TRANSFORM.size, Image.Resampling.BICUBIC)
        torch.from_numpy(np.array(part)).permute(2, 0, 1).contiguous()


def busy() -> float:
    """Seconds of processors that this process and its living children have taken."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children())]
    return sum(spent.user + spent.system for spent in times)


def pipeline(pairs: PairSource, count: int, options: argparse.Namespace) -> Spent:
    """From batch to batch in the middle of a run, whose workers are as far ahead at the end as at the beginning."""
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
    for _ in islice(stream, WARM):
        pass
    start, before = time.perf_counter(), busy()
    seen = sum(batch.queries for batch in islice(stream, measured))
    spent = Spent((time.perf_counter() - start) / seen, (busy() - before) / seen)
    stream.close()
    return spent


def word_tokenizer() -> TextTokenizer:
    """Whole words, so that its cost is that of any fast tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"), 77)


def write(found: dict[str, list[Spent]], count: int, size: Any, options: argparse.Namespace) -> None:
    """A row for each method."""
    rows = []
    about = machine() | ({"commit": options.commit} if options.commit else {})
    for name, spent in found.items():
        both = list(zip(found["decoder"], spent, strict=True))
        rows.append(
            {
                "method": name,
                "pictures_per_second": f"{statistics.median(1 / one.wall for one in spent):.0f}",
                "of_decoder": f"{statistics.median(bare.wall / one.wall for bare, one in both):.3f}",
                "processor_ms": f"{1000 * statistics.median(one.busy for one in spent):.3f}",
                "of_decoder_by_processor_time": f"{statistics.median(bare.busy / one.busy for bare, one in both):.3f}",
                "rounds": options.rounds,
                "pictures": count,
                "workers": options.workers,
                "data": "given" if options.data else "synthetic JPEG, {} x {}, quality 95".format(*options.sides),
                "mean_bytes": f"{size:.0f}",
                "pillow": Image.__version__,
                **about,
            }
        )
    for row in rows:
        print(
            f"{row['method']:9} {row['pictures_per_second']:>6}/s, {row['of_decoder']} of the decoder; "
            f"{row['processor_ms']} ms of a processor, {row['of_decoder_by_processor_time']}"
        )
    with atomic_path(options.results / "images.csv") as path, path.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"bench_images: {error}")
