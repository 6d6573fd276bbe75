"""From the host to a GPU beside what the GPU computes: a side stream, and two buffers on each end.

A batch of a million pictures stays on the host; what visits the GPU is one micro-batch, and while it is computed the
next one is copied. The buffers are as large as the largest micro-batch, whatever the batch.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Slot:
    """One buffer on the host and one on the GPU, and when each is free again."""

    host: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    device: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    copied: Any = None
    """Event: the host's buffer has been read."""
    taken: Any = None
    """Event: the GPU's buffer has been read."""


class Staging:
    """What brings tensors to one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._slots = [_Slot(), _Slot()]
        self._lock = threading.Lock()

    def bring(self, tensor: Tensor) -> Tensor:
        """A copy of a CPU tensor on the GPU, for which the current stream waits and the host does not, unless it is
        two tensors ahead."""
        with self._lock:
            return self._bring(tensor)

    def _bring(self, tensor: Tensor) -> Tensor:
        slot = self._slots[0]
        self._slots.reverse()
        content = tensor.contiguous().view(-1).view(torch.uint8)
        size, now = len(content), torch.cuda.current_stream(self.device)
        if slot.copied is not None:
            slot.copied.synchronize()
        if len(slot.host) < size:
            # Written within inference mode and outside it.
            with torch.inference_mode(False):
                slot.host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
                # The kernels that read the smaller one are in the current stream, where its memory is used again.
                slot.device = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._stream.wait_stream(now)
        slot.host[:size].copy_(content)
        with torch.cuda.stream(self._stream):
            if slot.taken is not None:
                self._stream.wait_event(slot.taken)
            slot.device[:size].copy_(slot.host[:size], non_blocking=True)
            slot.copied = self._stream.record_event()
        now.wait_event(slot.copied)
        # A copy in the current stream's own memory, so that whoever keeps it need not know of the buffers.
        brought = slot.device[:size].clone().view(tensor.dtype).view(tensor.shape)
        slot.taken = now.record_event()
        return brought
