"""Without a GPU the kernels run under Triton's interpreter, which it must know before it is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Now, and not by chance within a test that takes the variable back.
    import triton.language  # noqa: F401
