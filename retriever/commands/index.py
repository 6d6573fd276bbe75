"""`retriever index …`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from retriever.commands.common import Switch, answer
from retriever.progress import Terminal


@dataclass(frozen=True)
class IndexBuild:
    """Build a FAISS index of an embedding store."""

    embeddings: Path
    """Folder that `retriever encode` wrote."""
    out: Path
    """Folder of the index."""
    factory: str = "auto"
    """FAISS factory string (Flat, SQfp16, IVF1024,Flat, HNSW32, OPQ32,IVF1024,PQ32x4fs …); auto chooses by size."""
    seed: int = 0
    """Of the sample of vectors that the index is trained on."""
    json: Switch = False
    """Print the summary as JSON."""

    def run(self, terminal: Terminal) -> int:
        from index import faiss_index
        from index.embeddings import EmbeddingStore
        from index.factory import choose, explain

        store = EmbeddingStore.open(self.embeddings)
        factory = self.factory
        if factory == "auto":
            factory = choose(store.rows)
            terminal.line(explain(factory, store.rows, store.dim))
        with terminal.bar(f"index {factory}", store.rows, "vectors") as advance:
            faiss_index.build(store, self.out, factory=factory, seed=self.seed, progress=advance)
        answer(self.json, {"index": str(self.out), "factory": factory, "rows": store.rows, "dim": store.dim})
        return 0


@dataclass(frozen=True)
class IndexVerify:
    """Check every file of an index or an embedding store against its checksum."""

    folder: Positional[Path]
    """The index or the store."""
    json: Switch = False
    """Print the summary as JSON."""

    def run(self, terminal: Terminal) -> int:
        from index.verify import verify

        answer(self.json, dataclasses.asdict(verify(self.folder)))
        return 0
