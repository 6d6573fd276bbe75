"""Run small training passes of the encoders as CUDA graphs, which the host launches with one call each.

The forward and backward of an encoder are captured once per micro-batch size and then replayed. Sizes are rounded up,
and the padding tokens form texts of one token each, whose outputs are ignored.

A replay reads and writes the same memory each time. Therefore a forward is only replayed if the backward of the
previous one has run, and the weights must stay at their addresses (models/mixed_precision.py). A replay accumulates the
gradients of the weights itself, because returning hundreds of gradients to autograd takes longer than launching the
graph. Any other pass runs without a graph.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from retriever.config.run import TrainConfig
from retriever.errors import ConfigError
from retriever.models.loading.quantized_linear import QuantizedLinear
from retriever.models.memory import MAX_CAPTURED_TOKENS
from retriever.models.mixed_precision import gradient_sums
from retriever.models.packed.attention import LONG, PackedLayout
from retriever.models.towers import Towers
from retriever.utils.device import Precision

# Number of sizes to capture; each capture takes time and memory.
MAX_CAPTURES = 16


def uses_cuda_graphs(config: TrainConfig, towers: Towers, precision: Precision, sizes: Sequence[int]) -> bool:
    """Whether a run uses CUDA graphs: as configured, otherwise where they are supported and pay.

    Args:
        config: Configuration of the run.
        towers: Towers on their device.
        precision: Precision of the towers.
        sizes: Tokens of each micro-batch of the first step. Larger ones run without graphs, and their remainders would
            be captured in a new size at each step.
    """
    if config.cuda_graphs is not None:
        return config.cuda_graphs
    return can_use_cuda_graphs(config, towers, precision) and max(sizes) <= MAX_CAPTURED_TOKENS


def can_use_cuda_graphs(config: TrainConfig, towers: Towers, precision: Precision) -> bool:
    """Whether micro-batches that are small enough can run as CUDA graphs."""
    # What TrainConfig refuses together with cuda_graphs.
    others = config.compile or config.gradient_checkpointing or config.shard_towers or config.model.image.name
    return not others and why_no_cuda_graphs(towers, precision) is None


def check_cuda_graphs(towers: Towers, precision: Precision) -> None:
    """Check that `use_cuda_graphs` supports the towers.

    Raises:
        ConfigError: the precision is not bf16 on a GPU, the attention of a model family needs padding, or weights are
            stored in 4 bits.
    """
    if reason := why_no_cuda_graphs(towers, precision):
        raise ConfigError(f"cuda_graphs: {reason}")


def why_no_cuda_graphs(towers: Towers, precision: Precision) -> str | None:
    """Return what `use_cuda_graphs` expected and found, or None if it supports the towers."""
    if precision != "bf16" or towers.device.type != "cuda":
        return f"expected bf16 on a GPU, found {precision} on {towers.device.type}"
    families = list(dict.fromkeys(encoder.config.model_type for encoder in towers.encoders))
    if not towers.padding_free or "mpnet" in families:
        return f"expected attention that needs no padding, found {', '.join(families)}"
    if any(isinstance(module, QuantizedLinear) for encoder in towers.encoders for module in encoder.modules()):
        return "expected weights of 16 bits, found 4 bits (model.lora.base nf4)"
    return None


def use_cuda_graphs(towers: Towers) -> None:
    """Replace the forward of each encoder by one that replays CUDA graphs for small training passes."""
    for encoder in towers.encoders:
        if not isinstance(encoder.forward, GraphedForward):
            encoder.forward = GraphedForward(encoder)


def release_cuda_graphs(towers: Towers) -> None:
    """Undo `use_cuda_graphs` and free the graphs.

    Left to the garbage collector, they would be freed at any time: in a forked process, or while another run in this
    process captures its graphs, which CUDA does not allow.
    """
    for encoder in towers.encoders:
        graphed = encoder.forward
        if isinstance(graphed, GraphedForward):
            del encoder.forward
            if graphed.plain_forward != encoder.forward:
                encoder.forward = graphed.plain_forward
            graphed.release()


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Context in which no garbage is collected, which may free memory of the device."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class GraphedForward:
    """The replacement for the forward method of an encoder."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.plain_forward = encoder, encoder.forward
        self.captures: dict[int, _Capture] = {}
        # All captures share a memory pool and a stream, because libraries keep a workspace per stream.
        self.pool: Any = None
        self.stream: Any = None
        self.gradients: dict[Tensor, Tensor] = {}
        """float32 accumulators of the gradients of the weights, at fixed addresses."""
        self.awaits_backward = False
        """Whether the backward of the last replayed forward has not run yet."""

    def __call__(self, input_ids: Tensor, position_ids: Tensor, layout: PackedLayout, **options: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        tokens = input_ids.shape[1]
        size = captured_size(tokens)
        if not self._can_replay(layout, size):
            return self.plain_forward(input_ids=input_ids, position_ids=position_ids, layout=layout, **options)
        capture = self.captures.get(size)
        if capture is None or capture.addresses != capture.current_addresses():
            if self.pool is None:
                self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(input_ids.device)
            with _without_garbage_collection():
                capture = self.captures[size] = _Capture(self, Inputs(size, input_ids.device))
        capture.inputs.fill(input_ids, position_ids, layout)
        self.awaits_backward = True
        # Makes the output require a gradient. Passing a weight instead would call its hooks without a gradient.
        dummy = torch.empty((), requires_grad=True)
        return BaseModelOutput(last_hidden_state=_Replay.apply(self, capture, tokens, dummy))

    def release(self) -> None:
        """Free the captured graphs."""
        self.captures.clear()
        self.gradients.clear()
        self.pool = self.stream = None

    def _can_replay(self, layout: PackedLayout, size: int) -> bool:
        if self.awaits_backward or size > MAX_CAPTURED_TOKENS or layout.max_seqlen > LONG:
            return False
        if not (torch.is_grad_enabled() and self.encoder.training):
            return False
        sums = gradient_sums(self.encoder)
        weights = list(self.encoder.parameters())
        # Frozen weights that are stored in bf16 have no copy, and need no sum.
        if any(weight.dtype != torch.bfloat16 or (weight.requires_grad and weight not in sums) for weight in weights):
            return False
        if not any(weight.requires_grad for weight in weights):
            return False
        return size in self.captures or len(self.captures) < MAX_CAPTURES

    def prepare_gradients(self, weights: list[Tensor]) -> None:
        """Make `gradient_sums` use the accumulators of the graphs, with the values accumulated so far."""
        sums = gradient_sums(self.encoder)
        to_replace = [weight for weight in weights if sums[weight] is not self.gradients[weight]]
        if unset := [self.gradients[weight] for weight in to_replace if sums[weight] is None]:
            torch._foreach_zero_(unset)
        for weight in to_replace:
            if (accumulated := sums[weight]) is not None:
                self.gradients[weight].copy_(accumulated)
            sums[weight] = self.gradients[weight]


def captured_size(tokens: int) -> int:
    """Round a number of tokens up to a captured size, a multiple of a sixteenth of its power of two (at least 256)."""
    step = max(256, 1 << (tokens.bit_length() - 5)) if tokens > 16 else 256
    return -(-tokens // step) * step


class Inputs:
    """The input tensors of a captured pass, for `size` tokens."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.input_ids, self.position_ids = (torch.zeros(1, size, dtype=torch.int64, device=device) for _ in range(2))
        positions = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.layout = PackedLayout(positions[:-1].clone(), positions[1:].clone(), positions, LONG)

    def fill(self, input_ids: Tensor, position_ids: Tensor, layout: PackedLayout) -> None:
        """Copy the tokens of a micro-batch. Each remaining token becomes a text of its own, with any token id."""
        tokens, positions = input_ids.shape[1], self.layout.cu_seqlens
        self.input_ids[:, :tokens].copy_(input_ids)
        self.position_ids[:, :tokens].copy_(position_ids)
        for target, source, padding in (
            (self.layout.start, layout.start, positions[tokens:-1]),
            (self.layout.end, layout.end, positions[tokens + 1 :]),
        ):
            target[:tokens].copy_(source)
            target[tokens:].copy_(padding)


class _Capture:
    """The graphs of forward and backward for one size."""

    def __init__(self, graphed: GraphedForward, inputs: Inputs) -> None:
        self.inputs = inputs
        self.weights = [weight for weight in graphed.encoder.parameters() if weight.requires_grad]
        device = inputs.input_ids.device

        def encode() -> Tensor:
            output = graphed.plain_forward(
                input_ids=inputs.input_ids, position_ids=inputs.position_ids, layout=inputs.layout
            )
            return output.last_hidden_state

        def gradients(out: Tensor, out_grad: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(out, self.weights, out_grad, allow_unused=True)

        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = graphed.stream
        # Per thread, because other threads copy to the device at the same time.
        settings: Any = {"pool": graphed.pool, "stream": stream, "capture_error_mode": "thread_local"}
        with torch.random.fork_rng(devices=[device]):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                # A warm-up outside the graphs, in which kernels are compiled and libraries allocate memory.
                out = encode()
                warm_up = gradients(out, torch.zeros_like(out))
            torch.cuda.current_stream(device).wait_stream(stream)
            # Leave out weights that the output does not depend on, for example those of a pooler.
            self.weights = [
                weight for weight, gradient in zip(self.weights, warm_up, strict=True) if gradient is not None
            ]
            for weight in self.weights:
                if weight not in graphed.gradients:
                    graphed.gradients[weight] = torch.empty_like(weight, dtype=torch.float32)
            del out, warm_up
            with torch.cuda.graph(self.forward, **settings):
                out = encode()
            self.out_grad = torch.zeros_like(out)
            with torch.cuda.graph(self.backward, **settings):
                captured = [gradient for gradient in gradients(out, self.out_grad) if gradient is not None]
                torch._foreach_add_([graphed.gradients[weight] for weight in self.weights], captured)
                del captured
        self.out, self.addresses = out.detach(), self.current_addresses()

    def current_addresses(self) -> list[int]:
        """Return the addresses of the weights. A graph reads them at the addresses of its capture."""
        return [weight.data_ptr() for weight in self.weights]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphed: GraphedForward, capture: _Capture, tokens: int, dummy: Tensor) -> Tensor:
        ctx.graphed, ctx.capture, ctx.tokens = graphed, capture, tokens
        capture.forward.replay()
        return capture.out[:, :tokens].detach()

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[None, ...]:
        capture = ctx.capture
        capture.out_grad[:, : ctx.tokens].copy_(out_grad)
        capture.out_grad[:, ctx.tokens :].zero_()
        ctx.graphed.prepare_gradients(capture.weights)
        capture.backward.replay()
        ctx.graphed.awaits_backward = False
        return None, None, None, None
