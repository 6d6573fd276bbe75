"""Splitting of long documents into windows that fit the model's maximum length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from eval.long_documents import window_id
from index.files import InputError
from index.passages import Passage
from retriever.models.towers import Towers

# Maximum share of a window for the title. A longer title is put before the text once, in the first window.
TITLE_SHARE = 0.25


def split_documents(towers: Towers, passages: Iterable[Passage], overlap: int = 32) -> Iterator[Passage]:
    """Split each document into windows of as many tokens as the model reads, each with the title.

    A window begins `overlap` tokens before the end of the previous one. A document that fits is a single window.

    Args:
        towers: the model whose tokenizer, prompt and maximum length are used.
        passages: the documents.
        overlap: tokens shared by consecutive windows; less than half a window.

    Yields:
        The windows; `eval.long_documents` defines their ids.

    Raises:
        InputError: the model has no maximum length, its tokenizer does not report the positions of tokens in the text,
            or `overlap` is out of range.
    """
    text_tokenizer = towers.tokenizer("document")
    tokenizer, limit = text_tokenizer.tokenizer, text_tokenizer.max_length
    if limit is None:
        raise InputError("windows: expected a model with a maximum length; this one reads texts whole")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"windows: expected a tokenizer of the tokenizers library, found {type(tokenizer).__name__}")
    prompt = len(tokenizer(towers.prompt("document"), add_special_tokens=False)["input_ids"])
    capacity = limit - text_tokenizer.special_count - prompt
    if not 0 <= overlap < capacity // 2:
        raise InputError(f"windows: expected an overlap from 0 to {max(0, capacity // 2 - 1)} tokens, found {overlap}")
    for passage in passages:
        title_tokens = len(tokenizer(passage.title, add_special_tokens=False)["input_ids"]) if passage.title else 0
        title = passage.title if title_tokens <= TITLE_SHARE * capacity else ""
        size = capacity - (title_tokens if title else 0)
        text = passage.text if title or not passage.title else passage.content
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        if len(spans) <= size:
            yield Passage(window_id(passage.id, 0), passage.title, passage.text)
            continue
        for number, start in enumerate(range(0, max(1, len(spans) - overlap), size - overlap)):
            last = min(start + size, len(spans)) - 1
            yield Passage(window_id(passage.id, number), title, text[spans[start][0] : spans[last][1]])
