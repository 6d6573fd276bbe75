"""Flags and output that commands share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff

from index.progress import Reporter

Switch = Annotated[bool, FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Flags of every command that embeds with a model."""

    model: str
    """Model folder or hub name, which may end in @revision."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the towers. auto: bf16 on GPUs from compute capability 8.0 on, otherwise fp32. Embeddings differ
    between precisions by rounding. CPUs with AMX are faster in bf16, too."""
    micro_batch_tokens: int | None = None
    """Maximum number of tokens per forward pass, including padding. None: 4096 on a CPU; on a GPU, up to 262144 as its
    free memory allows."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto: CUDA if there is a GPU."""
    json: Switch = False
    """Print the result as JSON."""

    def embedding_options(self) -> dict[str, Any]:
        """The flags of this class as arguments of the public functions."""
        return {
            "device": self.device,
            "precision": self.precision,
            "micro_batch_tokens": self.micro_batch_tokens,
        }

    def load(self, reporter: Reporter) -> Any:
        """The model (`retriever.load`)."""
        from retriever.encoding.model import load

        return load(self.model, **self.embedding_options(), progress=reporter)


@dataclass(frozen=True, kw_only=True)
class IndexDevice:
    """Flags of commands that search an index."""

    index_device: str = "auto"
    """Where the index is searched: cpu, cuda:1 …, or cuda for all GPUs. auto: the GPU of the model if there is one, if
    faiss has GPU support and the index fits into its memory; otherwise the CPU, and the reason is reported."""
    index_spread: Literal["auto", "shards", "replicas"] = "auto"
    """How several GPUs are used. shards: each holds a part of the index. replicas: each holds the whole index and
    answers a part of the queries. auto: one GPU if the index fits on it, otherwise shards."""

    def index_options(self) -> dict[str, Any]:
        """The flags of this class as arguments of the public functions."""
        return {"index_device": self.index_device, "index_spread": self.index_spread}


@dataclass(frozen=True, kw_only=True)
class TruncatedEmbedding(Embedding):
    """Flags of commands that can truncate embeddings."""

    dim: int | None = None
    """Keep only the first values of each embedding, scaled to unit length, for a model trained with loss.matryoshka.
    None: all values."""

    def embedding_options(self) -> dict[str, Any]:
        """The flags of this class as arguments of the public functions."""
        return {**super().embedding_options(), "dim": self.dim}


def answer(as_json: bool, values: dict[str, Any]) -> None:
    """Print the answer of a command on one line, as text or as JSON."""
    if as_json:
        print(json.dumps(values))
    else:
        print("  ".join(f"{key} {value}" for key, value in values.items()))
