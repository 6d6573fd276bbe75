"""Documents cut into windows that a model can read whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from eval.long_documents import window_id
from index.files import InputError
from index.passages import Passage
from retriever.models.towers import Towers

# A title may take up to this share of a window; what is left of it stands in the first window's text anyway.
TITLE_SHARE = 0.25


def split_documents(towers: Towers, passages: Iterable[Passage], overlap: int = 32) -> Iterator[Passage]:
    """Each document as windows of as many tokens as the model reads, its title before every one of them.

    A window begins `overlap` tokens before the last one's end; a document that fits is one window, as it is.

    Args:
        overlap: tokens; less than half a window.

    Raises:
        InputError: the model has no maximum, its tokenizer cannot tell where in the text its tokens stand, or
            `overlap` is too large.
    """
    tokens = towers.tokenizer("document")
    tokenizer, limit = tokens.tokenizer, tokens.max_length
    if limit is None:
        raise InputError("windows: expected a model with a maximum length; this one reads texts whole")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"windows: expected a tokenizer of the tokenizers library, found {type(tokenizer).__name__}")
    prompt = len(tokenizer(towers.prompt("document"), add_special_tokens=False)["input_ids"])
    room = limit - tokens.special_count - prompt
    if not 0 <= overlap < room // 2:
        raise InputError(f"windows: expected an overlap from 0 to {max(0, room // 2 - 1)} tokens, found {overlap}")
    for passage in passages:
        title = len(tokenizer(passage.title, add_special_tokens=False)["input_ids"]) if passage.title else 0
        kept = passage.title if title <= TITLE_SHARE * room else ""
        size = room - (title if kept else 0)
        text = passage.text if kept or not passage.title else passage.content
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        if len(spans) <= size:
            yield Passage(window_id(passage.id, 0), passage.title, passage.text)
            continue
        for number, start in enumerate(range(0, max(1, len(spans) - overlap), size - overlap)):
            last = min(start + size, len(spans)) - 1
            yield Passage(window_id(passage.id, number), kept, text[spans[start][0] : spans[last][1]])
