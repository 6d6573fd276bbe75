"""Arrays in npy files, opened without trusting their bytes."""

from __future__ import annotations

import tokenize
import warnings
from pathlib import Path

import numpy as np

from index.files import InputError

# What numpy raises for headers that are damaged; it evaluates them as Python.
UNREADABLE = (ValueError, EOFError, TypeError, SyntaxError, OverflowError, RecursionError, tokenize.TokenError)


def map_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array of an npy file in C order, memory-mapped and read-only.

    Raises:
        InputError: the file is no array of this dtype and shape.
    """
    try:
        with warnings.catch_warnings():
            # Of a header that is not as numpy writes it: what comes of it is checked below.
            warnings.simplefilter("ignore")
            array = np.lib.format.open_memmap(path, mode="r")
    except UNREADABLE as error:
        found = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: expected an array in npy format, found: {found:.200}") from None
    if array.dtype != dtype or array.shape != shape:
        raise InputError(f"{path}: expected {dtype} {shape}, found {array.dtype} {array.shape}")
    if not array.flags.c_contiguous:
        raise InputError(f"{path}: expected an array in C order, found one in Fortran order")
    return array
