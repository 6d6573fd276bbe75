"""Parse a YAML file of settings in bounded time and memory; any error in it becomes a ConfigError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from index.files import InputError, check_readable
from retriever.errors import ConfigError

# PyYAML parses about 100 KiB per second. The configuration of a run with a hundred sources has 30 KiB.
MAX_BYTES = 2**18
# Aliases count as often as they are used: nine aliases of nine aliases … would otherwise be billions of values.
MAX_VALUES = 100_000
MAX_DEPTH = 50


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses duplicate keys (YAML would keep the last one) and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node of the file."""
        if self.depth > MAX_DEPTH:
            mark = self.get_mark()
            raise yaml.composer.ComposerError(problem=f"more than {MAX_DEPTH} levels", problem_mark=mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the keys and values of a mapping node."""
        keys: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                raise yaml.constructor.ConstructorError(problem=f"{key.value} twice", problem_mark=key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            # PyYAML does not check what follows a tag, nor dates: `!!int x`, `!!bool maybe`, `2026-13-45`.
            kind = node.tag.rpartition(":")[2]
            found = repr(node.value) if isinstance(node, yaml.ScalarNode) else type(node).__name__
            raise yaml.constructor.ConstructorError(
                problem=f"{found:.60}, which is no {kind} ({error!s:.80})", problem_mark=node.start_mark
            ) from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file; None for an empty one.

    Raises:
        ConfigError: The file does not exist, is larger than MAX_BYTES, is not UTF-8 or not YAML, has duplicate keys, is
            nested too deeply, or its aliases multiply to more than MAX_VALUES values.
    """
    try:
        check_readable(path)
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: expected at most {MAX_BYTES:,} bytes, found {path.stat().st_size:,}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text: {error}") from None
    except InputError as error:
        raise ConfigError(str(error)) from None
    try:
        loader = _UniqueKeys(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _count(node, {}) > MAX_VALUES:
                raise ConfigError(f"{path}: expected at most {MAX_VALUES:,} values, found aliases that give more")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{place}: expected YAML, found: {problem:.200}") from None
    except RecursionError:
        raise ConfigError(f"{path}: expected YAML, found values nested too deeply") from None


def _count(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Return the number of values in a node, with those of aliases. A node that contains itself counts as too many."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if node in known:
        return known[node]
    known[node] = MAX_VALUES + 1
    children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    known[node] = 1 + sum(_count(child, known) for child in children)
    return known[node]
