"""Row memory: how many rows of a shape fit into device memory, measured for models of any input size."""

import math
from typing import TypeVar

from torch import Tensor

from ..compute.kernel import Kernel
from ..compute.saved_memory import SavedMemory, TooLarge
from ..compute.torch_device import free_memory
from ..methods.method import Shape

MAX_SHAPES = 1024  # limit of the input shapes that are remembered, for a model without an input size
SMALL_CHUNK_BYTES = 64 * 1024 * 1024  # chunks up to this size run without checking the free memory

_Value = TypeVar("_Value")


class RowMemory:
    """The shapes that have run, and the bytes per row of each. Used on the device's thread only."""

    def __init__(self, name: str, kernel: Kernel, *, device_memory_limit: int) -> None:
        self._name = name
        self._kernel = kernel
        self._set_limit = device_memory_limit  # 0: half of the free memory
        self._shapes: dict[Shape, None] = {}  # shapes that have run, newest last
        self._row_bytes: dict[Shape, int] = {}  # by shape, the newest last

    @property
    def limit_bytes(self) -> int:
        """The bytes that a chunk may take now."""
        return self._set_limit or free_memory(self._kernel.device)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes that rows ran on, the newest last."""
        return tuple(self._shapes)

    def add_shape(self, shape: Shape) -> None:
        _remember(self._shapes, shape, None)

    def has_run(self, shape: Shape) -> bool:
        return shape in self._shapes

    def fitting(self, shape: Shape, rows: int) -> int:
        """Return how many of `rows` rows of a shape fit, at least 1; `check` makes the final check."""
        # For an unknown shape, count only the inputs: they are allocated before a row is measured.
        row_bytes = self._row_bytes.get(shape) or 2 * math.prod(shape) * self._kernel.dtype.itemsize
        return max(1, min(rows, self._room(row_bytes, rows)))

    def check(self, inputs: Tensor, *, least: int, is_padded: bool) -> None:
        """Raise `TooLarge` if rows, [n, C, H, W], do not fit into memory.

        The memory of a row of a new shape is measured by a forward pass, padded to the module's `least` batch size;
        the pass stops at the limit. A padded chunk cannot be split, so it fits as a whole or not at all.
        """
        n, shape = len(inputs), shape_of(inputs)
        if shape not in self._row_bytes:
            limit = self.limit_bytes
            saved = self._kernel.saved_memory(inputs[:1], limit=limit)
            self.learn(saved, inputs[:1], limit=limit, n_rows=max(1, least))
        fitting = self._room(self._row_bytes[shape], n)
        if fitting < 1:
            raise self._too_large(shape, limit=self.limit_bytes)
        if fitting < n:
            raise TooLarge(
                f'model "{self._name}": {n} rows of [C, H, W] = {list(shape)} at once, there is memory for {fitting}',
                fitting=0 if is_padded else fitting,
            )

    def learn(self, kept: SavedMemory, inputs: Tensor, *, limit: int, n_rows: int) -> None:
        """Record the bytes per row, from a pass of `n_rows`. Raises `TooLarge` if the pass exceeded the limit."""
        shape = shape_of(inputs)
        if kept.is_over:
            raise self._too_large(shape, limit=limit)
        _remember(self._row_bytes, shape, -(-kept.n_bytes // n_rows) + 2 * inputs[0].nbytes)

    def _room(self, row_bytes: int, rows: int) -> int:
        """Return how many rows fit into memory; `rows` if they take little."""
        little = min(SMALL_CHUNK_BYTES, self._set_limit or SMALL_CHUNK_BYTES)
        return rows if rows * row_bytes <= little else self.limit_bytes // row_bytes

    def _too_large(self, shape: Shape, *, limit: int) -> TooLarge:
        return TooLarge(
            f"images: an example of [C, H, W] = {list(shape)} takes more memory than there is for model "
            f'"{self._name}", {limit} bytes (device_memory_limit, or half of what is free); send a smaller one'
        )


def shape_of(inputs: Tensor) -> Shape:
    """Return C, H, W of rows."""
    _, channels, height, width = inputs.shape
    return channels, height, width


def _remember(known: dict[Shape, _Value], shape: Shape, value: _Value) -> None:
    """Set a value, and drop the oldest above `MAX_SHAPES`: callers choose the shapes."""
    known.pop(shape, None)
    known[shape] = value
    if len(known) > MAX_SHAPES:
        del known[next(iter(known))]
