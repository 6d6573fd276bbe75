"""The public function `retriever.encode`, which embeds a corpus or images into an embedding store."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from index.beir import beir_file, is_beir_folder
from index.files import InputError
from index.image_files.folders import images_in
from index.progress import Progress, Reporter, SilentReporter, as_reporter
from index.store.reader import EmbeddingStore
from retriever.distributed.context import joined_ranks, rank_device, same_settings
from retriever.encoding.corpus import StoreOptions
from retriever.encoding.files import embed_corpus
from retriever.encoding.image_items import ImageColumns, is_image_data, open_image_items
from retriever.encoding.image_store import encode_images
from retriever.encoding.model import Model, ModelInput, as_model, load
from retriever.encoding.window_workers import workers_for
from retriever.errors import ArgumentError, check_at_least, check_choice, check_paths
from retriever.models.images.folder import is_image_text_model
from retriever.utils.device import PrecisionChoice

StoreDtype = Literal["float32", "float16", "int8", "binary"]


def encode(
    model: ModelInput,
    data: str | Path,
    out: str | Path,
    *,
    dtype: StoreDtype = "float32",
    shard_rows: int = 65536,
    workers: int | None = None,
    fields: Sequence[str] = (),
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    micro_batch_tokens: int | None = None,
    dim: int | None = None,
    image: str = "",
    caption: str = "",
    skip_broken: bool = False,
    progress: Progress = None,
) -> EmbeddingStore:
    """Embed a corpus, or images, into a sharded embedding store with checksums.

    An interrupted call can be repeated: it continues after the last complete shard. Under torchrun every process
    calls this function, and the processes share the corpus shard by shard, or the images batch by batch.

    Args:
        model: A model from `retriever.load`, or its folder or hub name.
        data: A BEIR folder (its corpus), or a .jsonl, .csv, .tsv (each also .gz) or .parquet file with the columns
            _id (or id), text and optionally title. With an image–text model also images: a folder of image files,
            webdataset tars (a folder, braces or wildcards, .tar.gz, a URL), a table with a column of images or their
            paths, or a folder of Parquet files or of a saved Hugging Face dataset. Captions become the texts that a
            search shows.
        out: Folder of the store.
        dtype: Dtype of the embeddings on disk; "int8" (a quarter of the bytes) and "binary" (1 bit per value) need
            embeddings of unit length. Default: "float32".
        shard_rows: Rows per shard, at most this many per process are lost if a run is killed. Default: 65536.
        workers: Processes that read and tokenize the corpus, for each process of torchrun; 0 uses threads. Default:
            None, as many as the device needs and the machine has processors for.
        fields: Further columns of the corpus that an index keeps, for results and filters: text, numbers, true or
            false, and lists of texts. "metadata.year" is "year" in the object "metadata". Default: none.
        device: Device, if `model` is a folder or name. Default: "auto", CUDA if there is a GPU.
        precision: As for `retriever.load`, if `model` is a folder or name.
        micro_batch_tokens: As for `retriever.load`, if `model` is a folder or name.
        dim: Keep the first `dim` values of each embedding, at unit length. Default: None, all that `model` computes.
        image: Column of a table with the images or their paths. Default: "", the usual names, unless the table has the
            columns of a corpus.
        caption: Column of a table, or txt or json:KEY of tars, with the captions. Default: "", the usual names.
        skip_broken: Leave out the rows of a corpus that cannot be read, and name them in left_out.jsonl in the store.
            Default: False, the first one is an error. Unreadable images are always left out and named there.
        progress: Called with a `ProgressEvent` at each step. Default: None, messages go to the logger "retriever".

    Returns:
        The store, N rows of D dimensions.

    Raises:
        InputError: The data or the model cannot be read, or `out` contains something else.
        ConfigError: An argument is invalid.
    """
    check_choice(get_args(StoreDtype), dtype=dtype)
    check_at_least(1, shard_rows=shard_rows)
    if workers is not None:
        check_at_least(0, workers=workers)
    if dim is not None:
        check_at_least(1, dim=dim)
    if isinstance(fields, str) or not all(isinstance(name, str) for name in fields):
        raise ArgumentError("fields", f"expected names of columns, found {fields!r:.60}")
    fields = list(fields)
    check_paths(data=data, out=out)
    if not isinstance(model, Model):
        check_paths(model=model)
    data, out, reporter = str(data), Path(out), as_reporter(progress)
    if isinstance(model, Model):
        device, precision = str(model.device), model.options.precision
        micro_batch_tokens = model.options.micro_batch_tokens
    given = {
        "dtype": dtype,
        "dim": dim,
        "shard_rows": shard_rows,
        "fields": fields,
        "precision": precision,
        "micro_batch_tokens": micro_batch_tokens,
        "skip_broken": skip_broken,
    }
    with joined_ranks(same_settings("encode", device, given)) as ranks:
        reporter = reporter if ranks.is_first else SilentReporter()
        columns = ImageColumns(image, caption, tuple(fields))
        folder = Path(data).is_dir()
        images = not is_beir_folder(Path(data)) if folder else _embeds_images(model) and is_image_data(data, columns)
        if images and _embeds_images(model):
            if skip_broken:
                raise ArgumentError("skip_broken", "leave it out with images; unreadable ones are always left out")
            # Before the model, which takes longer to load.
            with tempfile.TemporaryDirectory(prefix=".images-", dir=_parent(out)) as cache:
                with reporter.bar(f"index {Path(data).name}", None, "parts") as advance:
                    items = open_image_items(data, columns, Path(cache), workers=workers or 0, progress=advance)
                model = _loaded(model, device, precision, micro_batch_tokens, dim, reporter)
                model.towers.to(rank_device(model.device))
                return encode_images(
                    model.image_towers(),
                    items,
                    out,
                    model.options,
                    reporter,
                    dtype=dtype,
                    shard_rows=shard_rows,
                    ranks=ranks,
                )
        if image or caption:
            raise InputError(f"{data}: expected images for the columns {image or caption!r}, found a corpus of texts")
        model = _loaded(model, device, precision, micro_batch_tokens, dim, reporter)
        corpus = Path(data)
        if not corpus.exists():
            raise InputError(f"{corpus}: no such file or folder")
        if images and images_in(corpus):
            raise InputError(
                f"{corpus}: expected a corpus for {model.name}, which embeds texts only, found a folder of images"
            )
        model.towers.to(rank_device(model.device))
        return embed_corpus(
            model.towers,
            beir_file(corpus, "corpus.jsonl") if folder else corpus,
            out,
            model.options,
            reporter,
            storage=StoreOptions(dtype, shard_rows, workers=workers_for(model.device) if workers is None else workers),
            ranks=ranks,
            fields=fields,
            skip_broken=skip_broken,
        )


def _loaded(
    model: ModelInput,
    device: str,
    precision: PrecisionChoice,
    micro_batch_tokens: int | None,
    dim: int | None,
    reporter: Reporter,
) -> Model:
    if not isinstance(model, Model):
        model = load(
            model, device=device, precision=precision, micro_batch_tokens=micro_batch_tokens, progress=reporter
        )
    return as_model(model, dim=dim)


def _parent(out: Path) -> Path:
    """The folder of a store's folder, in which there is space for unpacked tars."""
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    return out.resolve().parent


def _embeds_images(model: ModelInput) -> bool:
    return model.embeds_images if isinstance(model, Model) else is_image_text_model(str(model))
