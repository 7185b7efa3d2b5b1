"""Recorded kernels: a module's forward pass and its way back to the input, each one replay on a GPU.

A small chunk's hundreds of kernels take the host longer to launch than the GPU to run. A CUDA graph launches them in
one go, always on the same buffers and for the same number of rows. So there is a ladder of sizes: a chunk takes the
next one up, and the rows beyond its own say nothing. Between the two passes the head, which differs from chunk to
chunk, runs as usual.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UPS = 3  # before the recording: libraries choose their algorithms and take their workspaces then

Compute = Callable[[Tensor], Tensor]  # inputs, [n, C, H, W], to outputs
Replay = Callable[[], None]
Record = Callable[[Replay, Replay], tuple[Replay, Replay]]


class Recording:
    """The two passes for one number of rows. What it returns is the caller's own: the buffers are written again."""

    def __init__(self, compute: Compute, like: Tensor, *, n_rows: int, record: Record) -> None:
        shape = (n_rows, *like.shape[1:])
        self._compute = compute
        self._inputs = torch.zeros(shape, dtype=like.dtype, device=like.device).requires_grad_()
        self._forward()
        self._sent = torch.zeros_like(self._outputs)
        self._replay_forward, self._replay_backward = record(self._forward, self._backward)

    def outputs(self, inputs: Tensor) -> Tensor:
        """Return the outputs of inputs, [n, C, H, W], no more of them than the recording has rows."""
        with torch.no_grad():
            self._inputs[: len(inputs)].copy_(inputs)
        self._replay_forward()
        return self._outputs.detach()[: len(inputs)].clone()

    def gradients(self, sent: Tensor) -> Tensor:
        """Return the gradients at those inputs, given the gradients at their outputs."""
        self._sent[len(sent) :] = 0
        self._sent[: len(sent)].copy_(sent)
        self._replay_backward()
        return self._gradients[: len(sent)].clone()

    def _forward(self) -> None:
        with torch.enable_grad():
            self._outputs = self._compute(self._inputs)

    def _backward(self) -> None:
        (self._gradients,) = torch.autograd.grad(self._outputs, self._inputs, self._sent)


class Recordings:
    """The ladder for each shape of input, recorded as sizes are asked for. Used by the device's thread alone."""

    def __init__(self, compute: Compute, record: Record) -> None:
        self._compute = compute
        self._record = record
        self._recorded: dict[tuple[int, ...], Recording] = {}

    def of(self, inputs: Tensor) -> Recording:
        """Return the recording that such inputs fit: of the next power of two."""
        n_rows = 1 << (len(inputs) - 1).bit_length()
        key = (n_rows, *inputs.shape[1:])
        if key not in self._recorded:
            self._recorded[key] = Recording(self._compute, inputs, n_rows=n_rows, record=self._record)
        return self._recorded[key]


def recorder(device: torch.device) -> Record:
    """Return what records on a device. Without graphs the passes simply run again."""
    if device.type != "cuda":
        return lambda forward, backward: (forward, backward)
    # One pool for all: they run one after the other on one stream, and what one returns is copied out of it.
    pool = torch.cuda.graph_pool_handle()

    def record(forward: Replay, backward: Replay) -> tuple[Replay, Replay]:
        # torch's own annotations leave streams out. This one is no default: that would be the first device's.
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                forward()
                backward()
        torch.cuda.current_stream(device).wait_stream(aside)
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        for graph, run in zip(graphs, (forward, backward), strict=True):
            # Other threads, those of another device, may go on meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                run()
        return graphs[0].replay, graphs[1].replay

    return record
