"""The public function `retriever.search`, which searches an index for passages or images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from index.ann.gpu.search import Spread
from index.ann.index import Index
from index.ann.multi_index import MultiIndex
from index.fields.filters import Filter, FilterInput, as_filter
from index.files import InputError
from index.progress import Progress, as_reporter
from retriever.encoding.model import ModelInput, as_model
from retriever.errors import ArgumentError, check_at_least, check_unicode, path_list
from retriever.searching.search import Answer
from retriever.searching.search import search as search_each
from retriever.utils.indexes import check_index_device, open_indexes, place_index

IndexInput = Index | MultiIndex | str | Path | Sequence[str | Path]


def search(
    model: ModelInput,
    index: IndexInput,
    queries: str | Path | Sequence[str | Path] | Mapping[str, str],
    k: int = 10,
    *,
    dim: int | None = None,
    filter: FilterInput | None = None,
    index_device: str = "auto",
    index_spread: Spread = "auto",
    progress: Progress = None,
) -> list[Answer]:
    """Find the passages or images of an index that are nearest to queries.

    Args:
        model: A model from `retriever.load`, or its folder or hub name; the one that embedded the passages.
        index: An index from `retriever.build_index` or `retriever.Index.open`, its folder, or several folders that
            are searched as one.
        queries: A text, several texts, or a mapping of ids to texts. A `pathlib.Path` is an image file, if the model
            embeds images. Queries without an id are numbered from 1.
        k: Results per query. Default: 10.
        dim: Keep the first `dim` values of each query embedding, for an index of truncated passages. Default: None,
            all that `model` computes.
        filter: Only passages whose fields match, for example `{"lang": "en", "year": {"$gte": 2000}}` or the text
            "lang=en year>=2000". `retriever.encode(fields=…)` keeps the fields. Default: None, all passages.
        index_device: Where the index is searched, if `index` is a folder or folders: "cpu", "cuda:1" and so on, or
            "cuda" for all GPUs. Default: "auto", the GPU of the model if there is one and it can search the index,
            otherwise the CPU. An opened index is searched where `Index.to` has put it.
        index_spread: How several GPUs are used: "shards" or "replicas". Default: "auto", one GPU if it holds the index,
            else shards.
        progress: Called with a `ProgressEvent` for each batch of queries. Default: None.

    Returns:
        One `Answer` for each query, in order: `id`, `query` and `results`, each with `rank`, `score`, `id`, `title`,
        `text` and `fields`, best first. An approximate index or a filter may find fewer than k.

    Raises:
        InputError: The index belongs to another model or dimension or is damaged, a GPU cannot search it, or an image
            cannot be read.
        ConfigError: An argument is invalid.
    """
    chosen = parsed_filter(filter)
    check_at_least(1, k=k)
    if isinstance(index, Index | MultiIndex) and (index_device, index_spread) != ("auto", "auto"):
        raise ArgumentError("index_device", "give the folder of an index with it, or move an opened index by Index.to")
    check_index_device(index_device)
    if isinstance(queries, str | Path):
        queries = [queries]
    if isinstance(queries, bytes) or not isinstance(queries, Iterable):
        raise ArgumentError("queries", f"expected a text or texts, found {type(queries).__name__}")
    if isinstance(queries, Mapping):
        named: list[tuple[str, str | Path]] = list(queries.items())
    else:
        named = [(str(number), query) for number, query in enumerate(queries, start=1)]
    for name, query in named:
        if not isinstance(name, str):
            raise ArgumentError("queries", f"expected ids that are text, found {name!r:.60}")
        if not isinstance(query, str | Path):
            raise ArgumentError("queries", f"query {name}: expected text, found {type(query).__name__}")
        if isinstance(query, str) and not query.strip():
            raise ArgumentError("queries", f"query {name}: expected text, found none")
        if isinstance(query, str):
            check_unicode(f"queries: query {name}", query)
    reporter = as_reporter(progress)
    if not isinstance(index, Index | MultiIndex):
        folders = path_list("index", index)
        if not folders:
            raise ArgumentError("index", "expected at least one index, found none")
        index = open_indexes([Path(folder) for folder in folders], reporter)
        loaded = as_model(model, progress, dim=dim)
        place_index(index, loaded.device, reporter, index_device=index_device, index_spread=index_spread)
    else:
        loaded = as_model(model, progress, dim=dim)
    answers = []
    with reporter.bar("search", len(named), "queries") as advance:
        for answer in search_each(loaded.towers, index, named, k, loaded.options, filter=chosen):
            answers.append(answer)
            advance(1)
    return answers


def parsed_filter(filter: FilterInput | None) -> Filter | None:
    """The filter of an argument.

    Raises:
        ConfigError: It is not a filter.
    """
    try:
        return as_filter(filter)
    except InputError as error:
        raise ArgumentError("filter", str(error).removeprefix("filter: ")) from None
