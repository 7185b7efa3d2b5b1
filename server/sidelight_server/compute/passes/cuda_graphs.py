"""CUDA graphs: records a module's forward and backward pass once and replays them.

For small chunks the host takes longer to launch hundreds of kernels than the GPU takes to run them. A CUDA graph
launches them at once, always on the same buffers and for the same number of rows. So graphs are recorded for powers of
two: a chunk uses the next larger one, and the output of its padding rows is ignored. Recordings are kept for the last
few input shapes. The head, which differs from chunk to chunk, runs without a graph between the two passes.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

MAX_SHAPES = 4  # input shapes with recordings: callers choose the shape if the model takes any size
WARM_UPS = 3  # passes before recording: libraries choose algorithms and allocate workspaces in them

Compute = Callable[[Tensor], Tensor]  # inputs, [n, C, H, W], to outputs
Replay = Callable[[], None]
Record = Callable[[Replay, Replay], tuple[Replay, Replay]]


class Recording:
    """The two recorded passes for one number of rows. Returned tensors are copies: the buffers are reused."""

    def __init__(self, compute: Compute, like: Tensor, *, n_rows: int, record: Record) -> None:
        shape = (n_rows, *like.shape[1:])
        self._compute = compute
        self._inputs = torch.zeros(shape, dtype=like.dtype, device=like.device).requires_grad_()
        self._forward()
        self._grad_outputs = torch.zeros_like(self._outputs)
        self._replay_forward, self._replay_backward = record(self._forward, self._backward)

    def outputs(self, inputs: Tensor) -> Tensor:
        """Return the outputs for inputs, [n, C, H, W], with n at most the recording's rows."""
        with torch.no_grad():
            self._inputs[: len(inputs)].copy_(inputs)
        self._replay_forward()
        return self._outputs.detach()[: len(inputs)].clone()

    def gradients(self, grad_outputs: Tensor) -> Tensor:
        """Return the gradients at the last inputs, given the gradients at their outputs."""
        self._grad_outputs[len(grad_outputs) :] = 0
        self._grad_outputs[: len(grad_outputs)].copy_(grad_outputs)
        self._replay_backward()
        return self._gradients[: len(grad_outputs)].clone()

    def _forward(self) -> None:
        with torch.enable_grad():
            self._outputs = self._compute(self._inputs)

    def _backward(self) -> None:
        (self._gradients,) = torch.autograd.grad(self._outputs, self._inputs, self._grad_outputs)


_OfShape = tuple[Record, dict[int, Recording]]  # how to record passes for an input shape; recordings by number of rows


class Recordings:
    """The recordings of each input shape, made on demand. Used on the device's thread only.

    Above `MAX_SHAPES` the least recently used shape is dropped, and the memory of its recordings freed.
    """

    def __init__(self, compute: Compute, new_record: Callable[[], Record]) -> None:
        self._compute = compute
        self._new_record = new_record
        self._by_shape: OrderedDict[torch.Size, _OfShape] = OrderedDict()  # least recently used first

    def of(self, inputs: Tensor) -> Recording:
        """Return the recording for inputs, [n, C, H, W]: that of the next power of two."""
        record, recorded = self._of_shape(inputs.shape[1:])
        n_rows = 1 << (len(inputs) - 1).bit_length()
        if n_rows not in recorded:
            recorded[n_rows] = Recording(self._compute, inputs, n_rows=n_rows, record=record)
        return recorded[n_rows]

    def _of_shape(self, shape: torch.Size) -> _OfShape:
        if shape in self._by_shape:
            self._by_shape.move_to_end(shape)
        else:
            if len(self._by_shape) >= MAX_SHAPES:  # first, so that its memory is available for the new one
                self._by_shape.popitem(last=False)
            self._by_shape[shape] = self._new_record(), {}
        return self._by_shape[shape]


def recorder(device: torch.device) -> Record:
    """Return a function that records passes with a memory pool of its own; on a CPU the passes just run again."""
    if device.type != "cuda":
        return lambda forward, backward: (forward, backward)
    # One pool for all recordings of a shape: they run one after the other on one stream, and results are copied out.
    # torch frees a pool only once all of its graphs are gone, so shapes do not share a pool.
    pool = torch.cuda.graph_pool_handle()

    def record(forward: Replay, backward: Replay) -> tuple[Replay, Replay]:
        # torch's type annotations lack streams. The device is given: the default would be the first one.
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                forward()
                backward()
        torch.cuda.current_stream(device).wait_stream(aside)
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        for graph, run in zip(graphs, (forward, backward), strict=True):
            # thread_local: threads of other devices may launch work during the capture.
            with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                run()
        return graphs[0].replay, graphs[1].replay

    return record
