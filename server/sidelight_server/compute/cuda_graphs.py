"""CUDA graphs: a module's forward and backward pass, recorded once and replayed on a GPU.

A small chunk's hundreds of kernels take the host longer to launch than the GPU to run. A CUDA graph launches them in
one go, always on the same buffers and for the same number of rows. So there is a ladder of sizes: a chunk takes the
next one up, and the rows beyond its own say nothing. The last few shapes of input have a ladder each. Between the two
passes the head, which differs from chunk to chunk, runs as usual.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

MAX_SHAPES = 4  # whose recordings are kept: of a model that takes any size, callers choose them
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


class _Ladder:
    """The recordings for one shape of input."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.recorded: dict[int, Recording] = {}  # by number of rows


class Recordings:
    """The ladder for each shape of input, recorded as sizes are asked for. Used by the device's thread alone.

    Above `MAX_SHAPES` the shape that was not asked for longest is forgotten, with all memory of its recordings.
    """

    def __init__(self, compute: Compute, new_record: Callable[[], Record]) -> None:
        self._compute = compute
        self._new_record = new_record
        self._ladders: OrderedDict[torch.Size, _Ladder] = OrderedDict()  # the last one asked for at the end

    def of(self, inputs: Tensor) -> Recording:
        """Return the recording that such inputs fit: of the next power of two."""
        ladder, n_rows = self._ladder(inputs.shape[1:]), 1 << (len(inputs) - 1).bit_length()
        if n_rows not in ladder.recorded:
            ladder.recorded[n_rows] = Recording(self._compute, inputs, n_rows=n_rows, record=ladder.record)
        return ladder.recorded[n_rows]

    def _ladder(self, shape: torch.Size) -> _Ladder:
        if shape in self._ladders:
            self._ladders.move_to_end(shape)
            return self._ladders[shape]
        if len(self._ladders) >= MAX_SHAPES:  # first, so that its memory is there for the new one
            self._ladders.popitem(last=False)
        ladder = self._ladders[shape] = _Ladder(self._new_record())
        return ladder


def recorder(device: torch.device) -> Record:
    """Return what records on a device, in memory of its own. Without graphs the passes simply run again."""
    if device.type != "cuda":
        return lambda forward, backward: (forward, backward)
    # One pool for all of a shape: they run one after the other on one stream, and what one returns is copied out of it.
    # torch gives a pool's memory back only once all of its graphs are gone, so two shapes share none.
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
