"""Exceptions that transformers raises for invalid models, and their messages."""

from __future__ import annotations

from safetensors import SafetensorError

# For folders that are incomplete or of another kind, and for impossible configurations.
_LOAD_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    AttributeError,
    TypeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    SafetensorError,
)


def load_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that loading a faulty model, or its first forward pass, may raise."""
    from huggingface_hub.errors import StrictDataclassError

    return (*_LOAD_ERRORS, StrictDataclassError)


def is_load_error(error: Exception) -> bool:
    """Return whether an exception tells of a faulty model. tokenizers raises bare exceptions for damaged files."""
    return isinstance(error, load_errors()) or type(error) is Exception


def one_line(error: Exception) -> str:
    """Return the message of an exception as one line of at most 300 characters."""
    text = " ".join(str(error).split())[:300]
    # The message of a KeyError is only the key.
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError) or not text else text


def disable_progress_bars() -> None:
    """Disable transformers' progress bars, which would disturb those of the command line."""
    from transformers.utils import logging

    logging.disable_progress_bar()
