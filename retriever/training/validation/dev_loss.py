"""The loss on a dev set of texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from index.beir import BeirDataset
from index.files import InputError
from losses import inf_cl_loss, sigmoid_loss
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.encoding.files import ticking


@dataclass(frozen=True)
class DevPairs:
    """The queries of a dev set, each with one passage, in an order that depends only on their number."""

    queries: tuple[str, ...]
    passages: tuple[str, ...]
    passage_ids: np.ndarray
    """int64 [M], equal for equal passages."""
    relevant: tuple[frozenset[int], ...]
    """For each query, the numbers in `passage_ids` of all passages that are judged relevant for it."""

    @classmethod
    def of(cls, dataset: BeirDataset) -> DevPairs:
        """Pair each query with its passage of the highest grade, the first by id of several.

        Raises:
            InputError: the split judges no passage of the corpus as relevant.
        """
        grades = {query: {p: g for p, g in judged.items() if g > 0} for query, judged in dataset.qrels.items()}
        best = {query: min(judged, key=lambda p: (-judged[p], p)) for query, judged in grades.items() if judged}
        wanted = set(best.values())
        texts = {passage.id: passage.content for passage in dataset.passages() if passage.id in wanted}
        ids = sorted(query for query, passage in best.items() if passage in texts and query in dataset.queries)
        if not ids:
            raise InputError(f"{dataset.qrels_file}: dev.loss: expected a relevant passage of the corpus, found none")
        # Queries with similar ids are often about the same subject, and would be each other's negatives.
        ids = [ids[row] for row in np.random.default_rng(0).permutation(len(ids))]
        numbers = {passage: number for number, passage in enumerate(texts)}
        return cls(
            tuple(dataset.queries[query] for query in ids),
            tuple(texts[best[query]] for query in ids),
            np.array([numbers[best[query]] for query in ids], dtype=np.int64),
            tuple(frozenset(numbers[p] for p in grades[query] if p in numbers) for query in ids),
        )

    def loss(
        self,
        towers: Any,
        loss: Any,
        batch_size: int,
        options: EncodeOptions,
        tick: Callable[[], None] | None = None,
    ) -> float:
        """Return the mean loss of batches of `batch_size` queries; a last smaller batch is left out.

        Args:
            towers: the towers, in evaluation mode and on their device.
            loss: the loss of the run. The dev loss has its logit scale, and its bias if it is the sigmoid loss.
            batch_size: number of queries in a batch. With fewer queries, all are one batch.
            options: how to encode.
            tick: called after every micro-batch; may raise to stop.
        """
        progress = ticking(lambda count: None, tick)
        device = towers.device
        queries = torch.from_numpy(embed_texts(towers, self.queries, "query", options, progress)).to(device)
        passages = torch.from_numpy(embed_texts(towers, self.passages, "document", options, progress)).to(device)
        size = min(batch_size, len(self.queries))
        sums = []
        with torch.no_grad():
            for start in range(0, len(self.queries) - size + 1, size):
                rows = slice(start, start + size)
                ids = torch.from_numpy(self.passage_ids[rows]).to(device)
                masks: dict[str, Any] = {
                    "query_ids": ids,
                    "passage_ids": ids,
                    "excluded": self._excluded(rows).to(device),
                }
                query, passage = queries[rows], passages[rows]
                if hasattr(loss, "logit_bias"):
                    value = sigmoid_loss(
                        query, passage, logit_scale=loss.logit_scale, logit_bias=loss.logit_bias, **masks
                    )
                else:
                    value = inf_cl_loss(query, passage, logit_scale=loss.logit_scale, **masks)
                sums.append(float(value))
        return float(np.mean(sums))

    def _excluded(self, rows: slice) -> torch.Tensor:
        """Return pairs int64 [R, 2] of a query and a passage of the batch that is relevant, but not its own."""
        ids = self.passage_ids[rows].tolist()
        positions: dict[int, list[int]] = {}
        for position, number in enumerate(ids):
            positions.setdefault(number, []).append(position)
        pairs = [
            (row, position)
            for row, relevant in enumerate(self.relevant[rows])
            for number in relevant - {ids[row]}
            for position in positions.get(number, ())
        ]
        return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
