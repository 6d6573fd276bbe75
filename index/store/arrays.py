"""Opening npy files safely."""

from __future__ import annotations

import tokenize
import warnings
from pathlib import Path

import numpy as np

from index.files import InputError

# Raised by numpy for damaged headers, which it evaluates as Python literals.
UNREADABLE = (ValueError, EOFError, TypeError, SyntaxError, OverflowError, RecursionError, tokenize.TokenError)


def map_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map the array of an npy file, read-only.

    Raises:
        InputError: the file is not a C-ordered array of this dtype and shape.
    """
    array = open_array(path)
    if array.dtype != dtype or array.shape != shape:
        raise InputError(f"{path}: expected {dtype} {shape}, found {array.dtype} {array.shape}")
    if not array.flags.c_contiguous:
        raise InputError(f"{path}: expected an array in C order, found one in Fortran order")
    return array


def open_array(path: Path) -> np.ndarray:
    """Memory-map the array of an npy file of any dtype and shape, read-only.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        with warnings.catch_warnings():
            # numpy warns about unusual headers; callers check the result.
            warnings.simplefilter("ignore")
            return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UNREADABLE as error:
        found = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: expected an array in npy format, found: {found:.200}") from None
