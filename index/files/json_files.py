"""JSON texts and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from index.files.atomic import atomic_path
from index.files.errors import InputError
from index.files.reading import check_readable

# The largest file that is parsed as one JSON value.
MAX_JSON_BYTES = 2**28


def parse_json(text: str, place: str) -> Any:
    """Parse a JSON text; `place` ("file:line") begins error messages.

    Raises:
        InputError: `text` is not JSON, is nested too deeply, or contains half of a surrogate pair, which cannot be
            written as UTF-8.
    """
    try:
        value = json.loads(text)
        # Text that was read as UTF-8 gets a lone surrogate only from an escape such as \\ud83d.
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise InputError(f"{place}: expected Unicode text, found half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        # The line number of the error counts within `text`; `place` has that of the file.
        at = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise InputError(f"{place}: expected JSON, found: {error.msg} at {at}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: expected JSON, found: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented UTF-8 JSON; NaN and infinity are refused."""
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing or not JSON.
    """
    try:
        check_readable(path)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: expected at most {MAX_JSON_BYTES:,} bytes, found {path.stat().st_size:,}")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected JSON, found: {error}") from None
    return parse_json(text, str(path))
