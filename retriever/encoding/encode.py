"""The public function `retriever.encode`: a corpus or a folder of images to an embedding store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from index.beir import beir_file, is_beir_folder
from index.files import InputError
from index.image_files import images_in
from index.progress import Progress, SilentReporter, as_reporter
from index.store.reader import EmbeddingStore
from retriever.distributed.context import joined_ranks, rank_device, same_settings
from retriever.encoding.corpus import StoreOptions
from retriever.encoding.files import embed_corpus
from retriever.encoding.image_folder import encode_image_folder, list_images
from retriever.encoding.model import Model, ModelInput, Precision, as_model, load
from retriever.encoding.window_workers import workers_for
from retriever.errors import ArgumentError, check_at_least, check_choice, check_paths
from retriever.models.images.folder import is_image_text_model

StoreDtype = Literal["float32", "float16"]


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
    precision: Precision = "fp32",
    micro_batch_tokens: int | None = None,
    dim: int | None = None,
    progress: Progress = None,
) -> EmbeddingStore:
    """Embed a corpus, or a folder of images, into a sharded embedding store with checksums.

    An interrupted call can be repeated: it continues behind the last complete shard. Under torchrun every process
    calls this function, and the processes share the corpus shard by shard.

    Args:
        model: A model from `retriever.load`, or its folder or hub name.
        data: A BEIR folder (its corpus), or a .jsonl, .csv, .tsv (each also .gz) or .parquet file with the columns
            _id (or id), text and optionally title. With an image–text model also a folder of images.
        out: Folder of the store.
        dtype: Dtype of the embeddings on disk. Default: "float32".
        shard_rows: Rows per shard, at most this many per process are lost if a run is killed. Default: 65536.
        workers: Processes that read and tokenize the corpus, for each process of torchrun; 0 uses threads. Default:
            None, as many as the device needs and the machine has processors for.
        fields: Further columns of the corpus that an index keeps, for results and filters: text, numbers, true or
            false, and lists of texts. "metadata.year" is "year" in the object "metadata". Default: none.
        device: Device, if `model` is a folder or name. Default: "auto", CUDA if there is a GPU.
        precision: As for `retriever.load`, if `model` is a folder or name.
        micro_batch_tokens: As for `retriever.load`, if `model` is a folder or name.
        dim: Keep the first `dim` values of each embedding, at unit length. Default: None, all that `model` computes.
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
    data, out, reporter = Path(data), Path(out), as_reporter(progress)
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
    }
    with joined_ranks(same_settings("encode", device, given)) as ranks:
        reporter = reporter if ranks.is_first else SilentReporter()
        folder_of_images = data.is_dir() and not is_beir_folder(data)
        if folder_of_images and _embeds_images(model):
            if ranks.world_size > 1:
                raise ArgumentError("data", "images are embedded by one process; start it without torchrun")
            if fields:
                raise ArgumentError("fields", "leave it out with a folder of images, which has no columns")
            # Before the model, which takes longer to load.
            list_images(data)
        if not isinstance(model, Model):
            model = load(
                model, device=device, precision=precision, micro_batch_tokens=micro_batch_tokens, progress=reporter
            )
        model = as_model(model, dim=dim)
        if not data.exists():
            raise InputError(f"{data}: no such file or folder")
        if folder_of_images and model.embeds_images:
            return encode_image_folder(
                model.image_towers(), data, out, model.options, reporter, dtype=dtype, shard_rows=shard_rows
            )
        if folder_of_images and images_in(data):
            raise InputError(
                f"{data}: expected a corpus for {model.name}, which embeds texts only, found a folder of images"
            )
        model.towers.to(rank_device(model.device))
        return embed_corpus(
            model.towers,
            beir_file(data, "corpus.jsonl") if data.is_dir() else data,
            out,
            model.options,
            reporter,
            storage=StoreOptions(dtype, shard_rows, workers=workers_for(model.device) if workers is None else workers),
            ranks=ranks,
            fields=fields,
        )


def _embeds_images(model: ModelInput) -> bool:
    return model.embeds_images if isinstance(model, Model) else is_image_text_model(str(model))
