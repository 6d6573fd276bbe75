"""Mutations of files: of bytes, of the values of JSON and YAML, and of what is inside a compressed file."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from typing import Any

# Values at the limits of types, and texts that other parsers have failed on.
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    -1e308,
    1e-320,
    0.5,
    "",
    " ",
    "a",
    "\0",
    "\ud800",
    "\x1b[31m\r\n",
    "\u202e\ufeff",
    "../../etc/passwd",
    "/dev/zero",
    "{0..999999999}.tar",
    "x" * 70_000,
    [],
    [[]],
    {},
    {"": None},
    [None],
    [1, "a", {}],
)
TOKENS: tuple[bytes, ...] = (
    b"NaN",
    b"Infinity",
    b"-1",
    b"1e999",
    b"9" * 5000,
    b"0x" + b"f" * 5000,
    b"[" * 5000,
    b"{" * 5000,
    b'{"a":' * 3000,
    b"null",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\0",
    b"\\ud800",
    b"\x1b[31m",
    b"\r",
    b"\n\n",
    b'"',
    b"\t",
    b",",
    b"#",
    b"!!int x",
    b"!!bool maybe",
    b"!!timestamp x",
    b"2026-13-45",
    b"&a [*a]",
    b"? [1, 2]\n: 3\n",
    b"a" * 100_000,
    b"\xe2\x80\xa8",
)


def mutate(data: bytes, name: str, rng: random.Random) -> bytes:
    """Return the bytes of a file with one to three mutations. The name tells what is inside."""
    if name.endswith(".gz") and rng.random() < 0.7:
        return gzip.compress(mutate(gzip.decompress(data), name.removesuffix(".gz"), rng), 1)
    if name.endswith(".json") and rng.random() < 0.6:
        return _json(data, rng, json.dumps)
    if name.endswith(".jsonl") and rng.random() < 0.5:
        lines = data.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = _json(lines[at], rng, json.dumps)
        return b"\n".join(lines) + b"\n"
    if name.endswith(".yaml") and rng.random() < 0.6:
        return _yaml(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(OPERATIONS)(data, rng)
    return data


def replace_value(tree: Any, rng: random.Random) -> Any:
    """Return a tree of dicts and lists with one value replaced, removed or added."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                collect(node[key])

    if not isinstance(tree, dict | list):
        return rng.choice(VALUES)
    collect(tree)
    if not places or rng.random() < 0.02:
        return rng.choice(VALUES)
    node, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.15:
        del node[key]
    elif kind < 0.25 and isinstance(node, dict):
        node[str(rng.choice(VALUES))] = rng.choice(VALUES)
    elif kind < 0.35:
        node[key] = rng.choice(places)[0]
    else:
        node[key] = rng.choice(VALUES)
    return tree


def _json(data: bytes, rng: random.Random, dump: Callable[[Any], str]) -> bytes:
    tree = replace_value(json.loads(data), rng)
    try:
        return dump(tree).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        # A list that contains itself.
        return b"[" * 100_000


def _yaml(data: bytes, rng: random.Random) -> bytes:
    """Replace the value of a line, which may be a number, a text or a flow mapping."""
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    key, colon, _ = lines[at].partition(":")
    value = rng.choice([json.dumps(rng.choice(VALUES)).encode(), rng.choice(TOKENS)])
    lines[at] = f"{key}{colon} " + value.decode("utf-8", "replace")
    return "\n".join(lines).encode()


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 64))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _remove(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 2, 16, 512)) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    part = data[start : start + rng.choice((1, 8, 64, 512))]
    return data[:start] + part * rng.choice((1, 2, 50)) + data[start:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.choice(TOKENS) + data[start:]


def _noise(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    new = rng.randbytes(rng.choice((1, 4, 8, 64)))
    return data[:start] + new + data[start + len(new) :]


def _number(data: bytes, rng: random.Random) -> bytes:
    """Replace a number."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", data[:200_000]))
    if not found:
        return _flip(data, rng)
    match = rng.choice(found)
    return data[: match.start()] + rng.choice(TOKENS[:8]) + data[match.end() :]


def _line(data: bytes, rng: random.Random) -> bytes:
    """Swap, repeat or remove a line."""
    lines = data.split(b"\n")
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(3)
    if kind == 0:
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == 1:
        lines.insert(other, lines[one])
    else:
        del lines[one]
    return b"\n".join(lines)


def _zeros(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((4, 8, 512, 4096)))
    return data[:start] + bytes(end - start) + data[end:]


def _ones(data: bytes, rng: random.Random) -> bytes:
    """Set a field to the largest value of its type."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((2, 4, 8)))
    return data[:start] + b"\xff" * (end - start - 1) + b"\x7f" * (end > start) + data[end:]


def _nothing(data: bytes, rng: random.Random) -> bytes:
    return b""


OPERATIONS = (
    *(_flip, _flip, _cut, _remove, _repeat, _insert, _insert, _noise, _number, _number, _line, _zeros, _ones),
    _nothing,
)
