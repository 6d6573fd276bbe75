"""Copy host tensors to a GPU on a side stream, through two pairs of buffers.

The embeddings and pixels of a large batch stay in host memory. Each micro-batch is copied while the previous one is
computed. The buffers are as large as the largest micro-batch, whatever the batch size.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Slot:
    """A host buffer and a GPU buffer, with the events after which each may be overwritten."""

    host: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    device: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    host_read: Any = None
    device_read: Any = None


class Staging:
    """Copies tensors to one GPU. Thread-safe."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._slots = [_Slot(), _Slot()]
        self._lock = threading.Lock()

    def to_device(self, tensor: Tensor) -> Tensor:
        """Return a copy of a CPU tensor on the GPU.

        The current stream waits for the copy. The host waits only if the last two copies have not finished.
        """
        with self._lock:
            return self._to_device(tensor)

    def _to_device(self, tensor: Tensor) -> Tensor:
        slot = self._slots[0]
        self._slots.reverse()
        content = tensor.contiguous().view(-1).view(torch.uint8)
        size, current = len(content), torch.cuda.current_stream(self.device)
        if slot.host_read is not None:
            slot.host_read.synchronize()
        if len(slot.host) < size:
            # The buffers are written both inside and outside inference mode.
            with torch.inference_mode(False):
                slot.host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
                # Freeing the smaller buffer is safe: the kernels that read it are on the current stream.
                slot.device = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._stream.wait_stream(current)
        slot.host[:size].copy_(content)
        with torch.cuda.stream(self._stream):
            if slot.device_read is not None:
                self._stream.wait_event(slot.device_read)
            slot.device[:size].copy_(slot.host[:size], non_blocking=True)
            slot.host_read = self._stream.record_event()
        current.wait_event(slot.host_read)
        # A copy in memory of the current stream, so that callers need not know about the buffers.
        copied = slot.device[:size].clone().view(tensor.dtype).view(tensor.shape)
        slot.device_read = current.record_event()
        return copied
