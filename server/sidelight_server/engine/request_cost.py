"""The cost of a request, in rows and in bytes of memory."""

import math
from typing import NamedTuple

from ..domain import Request, TopK
from ..models.model import Model
from .preparation.examples import input_shape, maps_shape, needs_no_preparation

BYTES_OF_FLOAT32 = 4

# An example in progress holds its input, its baseline, two running sums and its finished part. The examples of a
# request that are in progress at once are those with rows in the current chunk or in the previous one.
TENSORS_IN_PROGRESS = 5
EXAMPLES_IN_PROGRESS = 2

# Overhead per example besides its bytes and its maps: Python objects for its array, resolved target, explanation,
# digest and message.
BYTES_OF_EXAMPLE = 4096


class RequestCost(NamedTuple):
    """What a request takes until it is answered."""

    maps_bytes: int  # of the answer's maps, as float32
    state_bytes: int  # of its examples while they are in progress, and of pixels that are held until the answer
    n_rows: int  # upper bound


def cost_of(request: Request, model: Model) -> RequestCost:
    """Return the cost of a request. Raises `SidelightError` if the images' shape does not fit the model."""
    shape = input_shape(model, request.images)
    of_maps = maps_shape(shape, request)
    n_examples, n_elements = of_maps[0], math.prod(shape)
    n_open = 0 if request.method.is_one_row else min(n_examples, EXAMPLES_IN_PROGRESS * model.chunk_rows)
    tensors_bytes = n_open * TENSORS_IN_PROGRESS * n_elements * model.kernel.dtype.itemsize
    # The pixels of each image, and then those of the whole batch.
    pixels_bytes = 0 if needs_no_preparation(model, request.images) else 2 * n_examples * n_elements
    k = request.target.k if isinstance(request.target, TopK) else 1
    return RequestCost(
        maps_bytes=math.prod(of_maps) * BYTES_OF_FLOAT32,
        state_bytes=tensors_bytes + pixels_bytes + n_examples * BYTES_OF_EXAMPLE,
        n_rows=n_examples * k * request.method.rows(shape),
    )
