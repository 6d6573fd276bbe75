"""Changes of config.yaml between the start of a run and its resumption."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from retriever.config.run import TrainConfig

# Changes that are named.
SHOWN = 5
# They do not change what is trained.
IGNORED = ("out", "log_every", "checkpoint_every", "keep_checkpoints", "tensorboard")


def config_tree(config: TrainConfig) -> dict[str, Any]:
    """Return a configuration as it is kept in checkpoints: a tree of JSON values."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return tree


def changed_fields(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the fields that changed, as "optim.lr 2e-05 -> 1e-05". Fields that one of the trees lacks do not count."""
    changes = []
    for name in before.keys() & now.keys() - set(IGNORED):
        one, other = before[name], now[name]
        if isinstance(one, dict) and isinstance(other, dict):
            changes += [f"{name}.{change}" for change in changed_fields(one, other)]
        elif one != other:
            changes.append(f"{name} {one!r:.60} -> {other!r:.60}")
    return sorted(changes)


def describe_changes(before: dict[str, Any], config: TrainConfig, step: int) -> str:
    """Return a line about the changes since the checkpoint of a step; empty if there are none.

    Args:
        before: the tree that the checkpoint contains; empty in checkpoints of earlier versions.
        config: the configuration that was read now.
        step: the step of the checkpoint.
    """
    changes = changed_fields(before, config_tree(config))
    if not changes:
        return ""
    more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return f"config.yaml was changed since step {step}: {', '.join(changes[:SHOWN])}{more}; the new values are used"
