"""Small training passes by CUDA graphs: the host launches two things where it would launch some thousand.

An encoder's forward and its backward are captured once for each size of micro-batch, and replayed from then on. Sizes
are rounded up to a sixteenth, and the places beyond the last text are texts of one token each, which nobody reads.
Replays read and write the same memory every time; hence only passes whose backward comes before the next forward are
replayed, with weights that stay where they are (mixed_precision.py), whose gradients a replay adds up itself:
to hand some hundred of them to autograd takes longer than to launch it. What does not fit runs as it did.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retriever.errors import ConfigError
from retriever.models.mixed_precision import gradient_sums
from retriever.models.packed.attention import LONG, Spans
from retriever.models.towers import Towers
from retriever.utils.device import Precision

# More of them keep a GPU busy for longer than the host takes to launch their kernels.
MAX_TOKENS = 32768
# Sizes of micro-batches; each takes its time to capture.
MAX_CAPTURES = 16


def check_cuda_graphs(towers: Towers, precision: Precision) -> None:
    """Whether `replay_small_passes` can be.

    Raises:
        ConfigError: it is not bf16 on a GPU, or a family whose attention there is not all in kernels of ours.
    """
    if precision != "bf16" or towers.device.type != "cuda":
        raise ConfigError(f"cuda_graphs: expected bf16 on a GPU, found {precision} on {towers.device.type}")
    families = list(dict.fromkeys(encoder.config.model_type for encoder in towers.encoders))
    if not towers.padding_free or "mpnet" in families:
        raise ConfigError(f"cuda_graphs: expected attention that needs no padding, found {', '.join(families)}")


def use_cuda_graphs(towers: Towers) -> None:
    """From now on have the encoders' training passes replay CUDA graphs, where they are of few tokens."""
    for encoder in towers.encoders:
        if not isinstance(encoder.forward, _GraphedForward):
            encoder.forward = _GraphedForward(encoder)


class _GraphedForward:
    """In place of an encoder's forward method."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.plain = encoder, encoder.forward
        self.captures: dict[int, _Capture] = {}
        self.pool: Any = None
        self.stream: Any = None
        """Memory of all captures, and where they are captured: libraries keep a workspace for every stream."""
        self.sums: dict[Tensor, Tensor] = {}
        """Where every backward adds the gradients of the weights, fp32."""
        self.waiting = False
        """A replayed forward waits for its backward."""

    def __call__(self, input_ids: Tensor, position_ids: Tensor, spans: Spans, **rest: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        tokens = input_ids.shape[1]
        size = captured_size(tokens)
        if not self._replayable(spans, size):
            return self.plain(input_ids=input_ids, position_ids=position_ids, spans=spans, **rest)
        capture = self.captures.get(size)
        if capture is None or capture.addresses != capture.addresses_now():
            if self.pool is None:
                self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(input_ids.device)
            capture = self.captures[size] = _Capture(self, Inputs(size, input_ids.device))
        capture.inputs.fill(input_ids, position_ids, spans)
        self.waiting = True
        # What makes the output one that has a backward; a weight's hooks would be called without a gradient.
        tie = torch.empty((), requires_grad=True)
        return BaseModelOutput(last_hidden_state=_Replay.apply(self, capture, tokens, tie))

    def _replayable(self, spans: Spans, size: int) -> bool:
        if self.waiting or size > MAX_TOKENS or spans.longest > LONG:
            return False
        if not (torch.is_grad_enabled() and self.encoder.training):
            return False
        sums = gradient_sums(self.encoder)
        if any(weight.dtype != torch.bfloat16 or weight not in sums for weight in self.encoder.parameters()):
            return False
        return size in self.captures or len(self.captures) < MAX_CAPTURES

    def begin_sums(self, weights: list[Tensor]) -> None:
        """Have the sums of these gradients, whatever is in them already, where replays add to them."""
        found = gradient_sums(self.encoder)
        elsewhere = [weight for weight in weights if found[weight] is not self.sums[weight]]
        if fresh := [self.sums[weight] for weight in elsewhere if found[weight] is None]:
            torch._foreach_zero_(fresh)
        for weight in elsewhere:
            if (so_far := found[weight]) is not None:
                self.sums[weight].copy_(so_far)
            found[weight] = self.sums[weight]


def captured_size(tokens: int) -> int:
    """The next size that is captured."""
    step = max(256, 1 << (tokens.bit_length() - 5)) if tokens > 16 else 256
    return -(-tokens // step) * step


class Inputs:
    """What a captured pass reads: `size` tokens, as many of them of the texts as there are."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.input_ids, self.position_ids = (torch.zeros(1, size, dtype=torch.int64, device=device) for _ in range(2))
        places = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.spans = Spans(places[:-1].clone(), places[1:].clone(), places, LONG)

    def fill(self, input_ids: Tensor, position_ids: Tensor, spans: Spans) -> None:
        """Copy the tokens of some texts; each place beyond is a text of its own, of whatever token was there."""
        tokens, places = input_ids.shape[1], self.spans.offsets
        self.input_ids[:, :tokens].copy_(input_ids)
        self.position_ids[:, :tokens].copy_(position_ids)
        for own, given, beyond in (
            (self.spans.first, spans.first, places[tokens:-1]),
            (self.spans.end, spans.end, places[tokens + 1 :]),
        ):
            own[:tokens].copy_(given)
            own[tokens:].copy_(beyond)


class _Capture:
    """The forward and the backward of one size, as graphs in the memory of the encoder's others."""

    def __init__(self, graphed: _GraphedForward, inputs: Inputs) -> None:
        self.inputs = inputs
        self.weights = [weight for weight in graphed.encoder.parameters() if weight.requires_grad]
        device = inputs.input_ids.device

        def encode() -> Tensor:
            spans = inputs.spans
            output = graphed.plain(input_ids=inputs.input_ids, position_ids=inputs.position_ids, spans=spans)
            return output.last_hidden_state

        def gradients(out: Tensor, out_grad: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(out, self.weights, out_grad, allow_unused=True)

        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads copy to the device meanwhile.
        stream = graphed.stream
        settings: Any = {"pool": graphed.pool, "stream": stream, "capture_error_mode": "thread_local"}
        with torch.random.fork_rng(devices=[device]):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                # Kernels are compiled, and libraries take their memory, outside the graphs.
                out = encode()
                found = gradients(out, torch.zeros_like(out))
            torch.cuda.current_stream(device).wait_stream(stream)
            # Without those that nothing depends on, such as a pooler's.
            self.weights = [weight for weight, each in zip(self.weights, found, strict=True) if each is not None]
            for weight in self.weights:
                if weight not in graphed.sums:
                    graphed.sums[weight] = torch.empty_like(weight, dtype=torch.float32)
            del out, found
            with torch.cuda.graph(self.forward, **settings):
                out = encode()
            self.out_grad = torch.zeros_like(out)
            with torch.cuda.graph(self.backward, **settings):
                made = [gradient for gradient in gradients(out, self.out_grad) if gradient is not None]
                torch._foreach_add_([graphed.sums[weight] for weight in self.weights], made)
                del made
        self.out, self.addresses = out.detach(), self.addresses_now()

    def addresses_now(self) -> list[int]:
        """Where the weights are; the graphs read them where they were."""
        return [weight.data_ptr() for weight in self.weights]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphed: _GraphedForward, capture: _Capture, tokens: int, tie: Tensor) -> Tensor:
        ctx.graphed, ctx.capture, ctx.tokens = graphed, capture, tokens
        capture.forward.replay()
        return capture.out[:, :tokens].detach()

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[None, ...]:
        capture = ctx.capture
        capture.out_grad[:, : ctx.tokens].copy_(out_grad)
        capture.out_grad[:, ctx.tokens :].zero_()
        ctx.graphed.begin_sums(capture.weights)
        capture.backward.replay()
        ctx.graphed.waiting = False
        return None, None, None, None
