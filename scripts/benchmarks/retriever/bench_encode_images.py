"""Images per second of `retriever encode` from webdataset tars, against the decoder alone on the same cores.

    python scripts/benchmarks/retriever/bench_encode_images.py
    python scripts/benchmarks/retriever/bench_encode_images.py --data 'cc3m-{00000..00003}.tar'
    python scripts/benchmarks/retriever/bench_encode_images.py --device cuda --images 8192

Without --data the images are SYNTHETIC, those of bench_images.py. The image tower takes 224 x 224 pixels in 4 patches,
so that decoding is the limit, as it is on a GPU. Rounds of the methods alternate in one process. Both read the same
images, from the page cache:

- decoder: bytes in memory are decoded, resized and center-cropped, in the threads of `retriever encode`.
- tower: images decoded before are embedded.
- encode: `retriever.encode` as a whole: indexes of the tars, checksums, decoding, embedding, the store on disk.

The target is that encode has 0.9 of the decoder's images per second. On a GPU, `of_decoder` is this ratio. On a CPU,
decoder and tower share the cores, and no program that does both can have the decoder's rate: `without_tower` compares
the decoder's processor time with that of encode, less that of the tower. Other load on the machine slows the rates but
hardly changes the processor time. Rows of encode_images.csv with the same method and device are replaced.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import retriever
from index.files import InputError
from retriever.config.images import ImageConfig, ImageSource
from retriever.config.model import ModelConfig
from retriever.data.images.sources import open_pairs
from retriever.encoding.encoder import EncodeOptions
from retriever.encoding.image_encoder import DECODE_BATCH, ImageDecoder, embed_pixels
from retriever.encoding.model import Model
from retriever.models.images.towers import build_image_text_towers
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows
from scripts.benchmarks.retriever.bench_images import SecondsPerImage, argument_parser, word_tokenizer, write_tars

BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
VISION = {
    "image_size": 224,
    "patch_size": 112,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def main() -> None:
    """Measure both methods in every round."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = options.data or write_tars(folder / "set", options)
        model = small_model(folder, options.device)
        pairs = open_pairs(ImageSource(data), folder / "cache")
        images = [(pairs.read(row).image, str(row)) for row in range(len(pairs))]

        def decode() -> None:
            with ImageDecoder(model.image_towers()) as decoder:
                for start in range(0, len(images), DECODE_BATCH):
                    decoder(images[start : start + DECODE_BATCH])

        with ImageDecoder(model.image_towers()) as decoder:
            decoded = [pixels for pixels in decoder(images[:DECODE_BATCH]) if not isinstance(pixels, str)]

        def embed() -> None:
            for start in range(0, len(images), DECODE_BATCH):
                embed_pixels(model.image_towers(), decoded[: len(images) - start], model.options)

        def encode(number: int) -> None:
            store = retriever.encode(model, data, folder / f"store {number}")
            if store.rows != len(images):
                raise SystemExit(f"expected {len(images)} rows, found {store.rows}")

        found: dict[str, list[SecondsPerImage]] = {"decoder": [], "tower": [], "encode": []}
        for number in range(options.rounds + 1):
            methods: list[tuple[str, Callable[[], None]]] = [
                ("decoder", decode),
                ("tower", embed),
                ("encode", lambda number=number: encode(number)),
            ]
            for name, work in methods if number % 2 else reversed(methods):
                spent = timed(work, len(images))
                # Round 0 is a warm-up.
                if number:
                    found[name].append(spent)
                    print(f"{name} {1 / spent.wall:,.0f}/s {1000 * spent.cpu:.2f} ms", flush=True)
    write(found, len(images), statistics.mean(len(content) for content, _ in images), options)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argument_parser(__doc__ or "", "encode_images.csv")
    parser.add_argument("--images", type=int, default=2048, help="synthetic images (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="device of the tower (default: %(default)s)")
    return parser.parse_args()


def small_model(folder: Path, device: str) -> Model:
    """A model with the usual input of 224 x 224 pixels, whose towers take next to no time."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    word_tokenizer().tokenizer.save_pretrained(folder / "tokenizer")
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder / "vision")
    CLIPImageProcessor().save_pretrained(folder / "vision")
    image = ImageConfig(name=str(folder / "vision"))
    towers = build_image_text_towers(
        ModelConfig(architecture=BERT, tokenizer=str(folder / "tokenizer"), pooling="mean", projection=64, image=image)
    )
    return Model("tiny", towers.eval().to(device), EncodeOptions())


def timed(work: Callable[[], None], images: int) -> SecondsPerImage:
    """Time of a call, and the processor time of all threads of this process."""
    started, before = time.perf_counter(), time.process_time()
    work()
    return SecondsPerImage((time.perf_counter() - started) / images, (time.process_time() - before) / images)


def write(found: dict[str, list[SecondsPerImage]], images: int, size: float, options: argparse.Namespace) -> None:
    """Write a row for each method."""
    about = machine(options.commit)
    rows = []
    for name, spent in found.items():
        every = list(zip(found["decoder"], found["tower"], spent, strict=True))
        ratio = statistics.median(bare.cpu / one.cpu for bare, _, one in every)
        apart = (
            statistics.median(bare.cpu / (one.cpu - tower.cpu) for bare, tower, one in every) if name == "encode" else 0
        )
        rows.append(
            {
                "method": name,
                "images_per_second": f"{statistics.median(1 / one.wall for one in spent):.0f}",
                "of_decoder": f"{statistics.median(bare.wall / one.wall for bare, _, one in every):.3f}",
                "processor_ms": f"{1000 * statistics.median(one.cpu for one in spent):.3f}",
                "of_decoder_by_processor_time": f"{ratio:.3f}",
                "without_tower": f"{apart:.3f}" if apart else "",
                "rounds": options.rounds,
                "images": images,
                "data": "given" if options.data else "synthetic JPEG, {} x {}, quality 95".format(*options.sides),
                "mean_bytes": f"{size:.0f}",
                "threads": torch.get_num_threads(),
                "device": options.device,
                **about,
            }
        )
    for row in rows:
        print(
            f"{row['method']:9} {row['images_per_second']:>6}/s, {row['of_decoder']} of the decoder; "
            f"{row['processor_ms']} ms of processor time, {row['of_decoder_by_processor_time']} of the decoder, "
            f"without the tower {row['without_tower'] or '–'}"
        )
    update_rows(rows, options.results / "encode_images.csv", ("method", "device", "hardware"))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"bench_encode_images: {error}")
