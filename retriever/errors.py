"""Errors that the command line answers in one line."""

from __future__ import annotations

from index.files import InputError


class ConfigError(InputError):
    """A setting that is not valid; the command line answers with exit code 2."""
