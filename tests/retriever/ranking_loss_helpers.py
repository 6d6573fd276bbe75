"""Models and batches for tests of the sentence-transformers losses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, BertConfig, BertModel

from losses import InfCLLoss

COLUMNS = ("anchor", "positive", "negative")
LEARNING_RATE = 0.05


class Tokens(nn.Sequential):
    """Mean of token embeddings, a linear layer and dropout, for padded or packed texts."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Dropout(dropout))
        with torch.random.fork_rng():
            torch.manual_seed(5)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.5)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        token = self[0](features["input_ids"])
        if "cu_seq_lens_q" in features:
            ends = features["cu_seq_lens_q"].tolist()
            mean = torch.stack([token[0, a:b].mean(0) for a, b in itertools.pairwise(ends)])
        else:
            mask = features["attention_mask"][:, :, None].float()
            mean = (token * mask).sum(1) / mask.sum(1)
        return {**features, "sentence_embedding": self[2](self[1](mean))}


def padded(texts: list[list[int]], left: bool = False) -> dict[str, Tensor]:
    """Return token ids with padding on the right or on the left."""
    width = max(map(len, texts)) + 1
    rows = [[0] * (width - len(text)) + text if left else text + [0] * (width - len(text)) for text in texts]
    mask = [[int(token > 0) for token in row] for row in rows]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def end_to_end(texts: list[list[int]]) -> dict[str, Any]:
    """Return token ids as a Transformer that unpads does."""
    ends = torch.tensor([0, *map(len, texts)]).cumsum(0).to(torch.int32)
    token = torch.tensor([[token for text in texts for token in text]])
    return {"input_ids": token, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(map(len, texts))}


def random_texts(rows: int, columns: int, seed: int = 0, tokens: int = 50, longest: int = 6) -> list[list[list[int]]]:
    """Return token ids [columns][rows]."""
    generator = torch.Generator().manual_seed(seed)

    def text() -> list[int]:
        length = int(torch.randint(1, 1 + longest, (), generator=generator))
        return torch.randint(1, tokens, (length,), generator=generator).tolist()

    return [[text() for _ in range(rows)] for _ in range(columns)]


def save_bert(tokenizer: str, folder: Path) -> None:
    """Save a sentence-transformers model: a BERT of two layers with random weights, without dropout."""
    known = AutoTokenizer.from_pretrained(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(known), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder / "bert")
    known.save_pretrained(folder / "bert")
    SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(32)]).save_pretrained(str(folder / "model"))


def triplets(rows: int) -> Dataset:
    """Return texts of several lengths, with two equal queries and a negative that is another query's positive."""
    texts = {name: [f"{name} {'abcdefghijklmnop'[i] * (1 + i % 5)}" for i in range(rows)] for name in COLUMNS}
    texts["anchor"][1] = texts["anchor"][0]
    texts["negative"][2] = texts["positive"][3]
    return Dataset.from_dict(texts)


def scores_loss(columns: list[Tensor], scale: Tensor | float, symmetric: bool = False) -> Tensor:
    """Compute the loss with the full matrix, without masks."""
    query, passage = normalize(columns[0], dim=1), normalize(torch.cat(columns[1:]), dim=1)
    scores, own = scale * query @ passage.T, torch.arange(len(query))
    loss = nn.functional.cross_entropy(scores, own)
    return (loss + nn.functional.cross_entropy(scores[:, : len(query)].T, own)) / 2 if symmetric else loss


def plain_loop(folder: Path, data: Dataset, steps: int) -> tuple[dict[str, Tensor], float]:
    """Train with SGD on the whole dataset, without a trainer and with masks written by hand. Returns weights and
    scale."""
    model, loss = SentenceTransformer(str(folder / "model"), device="cpu"), InfCLLoss(logit_scale=20.0)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=LEARNING_RATE)
    # Queries 0 and 1 are equal, and the negative of row 2 is the positive of row 3.
    rows = len(data)
    excluded = torch.tensor([[0, 1], [1, 0], [3, rows + 2]])
    for _ in range(steps):
        optimizer.zero_grad()
        query, *passages = [model(model.preprocess(data[name][:]))["sentence_embedding"] for name in COLUMNS]
        loss(normalize(query, dim=1), normalize(torch.cat(passages), dim=1), excluded=excluded).backward()
        optimizer.step()
    return model.state_dict(), float(loss.logit_scale.detach())
