"""Sets from other sources, by name: NanoBEIR on the Hugging Face Hub, and those of the package ir_datasets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from index.files import InputError, atomic_folder

NANO_BEIR = "nanobeir"
NANO_OWNER = "zeta-alpha-ai"
NANO = (
    "NanoArguAna",
    "NanoClimateFEVER",
    "NanoDBPedia",
    "NanoFEVER",
    "NanoFiQA2018",
    "NanoHotpotQA",
    "NanoMSMARCO",
    "NanoNFCorpus",
    "NanoNQ",
    "NanoQuoraRetrieval",
    "NanoSCIDOCS",
    "NanoSciFact",
    "NanoTouche2020",
)
"""The sets of NanoBEIR: 50 queries each, and a part of the corpus of a set of BEIR."""
IR_PREFIX = "ir:"
"""Before the name of a set of ir_datasets, such as ir:beir/scifact/test."""


def external_names(entry: str) -> list[str]:
    """Return the names of the external sets that an entry of --data means; an empty list if it means none."""
    if Path(entry).is_dir():
        return []
    if entry.lower() == NANO_BEIR:
        return list(NANO)
    if entry.startswith(IR_PREFIX):
        return [entry]
    return [name for name in NANO if name.lower() == entry.lower()]


def external_folder(name: str, home: Path) -> Path:
    """Return the folder of an external set within the folder of the sets."""
    return home / name.removeprefix(IR_PREFIX).replace("/", "-")


def download_external(name: str, home: Path, progress: Callable[[int], None]) -> Path:
    """Download an external set as a BEIR folder, unless it exists.

    Args:
        name: a name that `external_names` returned.
        home: the folder of the sets.
        progress: called with the number of documents written since the last call (only for ir_datasets).

    Returns:
        The folder of the set.

    Raises:
        InputError: the set does not exist, cannot be downloaded, or has no queries or judgements.
    """
    folder = external_folder(name, home)
    if folder.is_dir():
        return folder
    with atomic_folder(folder) as temporary:
        if name.startswith(IR_PREFIX):
            _write_ir_set(name.removeprefix(IR_PREFIX), temporary, progress)
        else:
            _download_nano(name, temporary)
    return folder


def _download_nano(name: str, folder: Path) -> None:
    from huggingface_hub import constants, snapshot_download

    repo = f"{NANO_OWNER}/{name}"
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{name}: not downloaded: the hub is not contacted offline (HF_HUB_OFFLINE is set)")
    patterns = ["corpus/*", "queries/*", "qrels/*"]
    try:
        snapshot_download(repo, repo_type="dataset", allow_patterns=patterns, local_dir=folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be downloaded from {repo}: {' '.join(str(error).split())[:300]}") from error


def _write_ir_set(name: str, folder: Path, progress: Callable[[int], None]) -> None:
    try:
        import ir_datasets
    except ImportError:
        raise InputError('ir_datasets is not installed: pip install "dense-retriever[ir]"') from None
    try:
        dataset = ir_datasets.load(name)
    except KeyError:
        raise InputError(f"ir:{name}: no such set in ir_datasets") from None
    for part in ("docs", "queries", "qrels"):
        if not getattr(dataset, f"has_{part}")():
            raise InputError(f"ir:{name}: expected a set with documents, queries and judgements, found no {part}")
    try:
        with open(folder / "corpus.jsonl", "w", encoding="utf-8") as stream:
            for document in dataset.docs_iter():
                stream.write(json.dumps(_passage(document), ensure_ascii=False) + "\n")
                progress(1)
        with open(folder / "queries.jsonl", "w", encoding="utf-8") as stream:
            for query in dataset.queries_iter():
                row = {"_id": query.query_id, "text": query.default_text()}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        (folder / "qrels").mkdir()
        with open(folder / "qrels" / "test.tsv", "w", encoding="utf-8") as stream:
            stream.write("query-id\tcorpus-id\tscore\n")
            for judgement in dataset.qrels_iter():
                stream.write(f"{judgement.query_id}\t{judgement.doc_id}\t{judgement.relevance}\n")
    # Its downloads fail with errors of several libraries, all of them with a message.
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"ir:{name}: cannot be read: {' '.join(str(error).split())[:300]}") from error


def _passage(document: Any) -> dict[str, str]:
    """A document in BEIR's fields. Sets without a title and a text have other fields, which ir_datasets joins."""
    title, text = getattr(document, "title", None), getattr(document, "text", None)
    if isinstance(title, str) and isinstance(text, str):
        return {"_id": document.doc_id, "title": title, "text": text}
    return {"_id": document.doc_id, "title": "", "text": document.default_text()}
