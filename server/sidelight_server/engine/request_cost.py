"""The cost of a request, in rows and in bytes of memory."""

import math

from ..domain import Request, TopK
from ..models.model import Model
from .preparation import input_shape, is_taken_as_it_is, maps_shape

BYTES_OF_FLOAT32 = 4


# An example in progress holds its input, its baseline, two running sums and its finished part. The examples of a
# request that are in progress at once are those with rows in the current chunk or in the previous one.
TENSORS_IN_PROGRESS = 5


EXAMPLES_IN_PROGRESS = 2


# Overhead per example besides its bytes and its maps: Python objects for its array, resolved target, explanation,
# digest and message.
BYTES_OF_EXAMPLE = 4096


def held_bytes(request: Request, model: Model) -> tuple[int, int]:
    """Return the bytes of the answer's maps, and the bytes that its examples take while in progress.

    The second includes the pixels of decoded and resized images, which are held until the answer, and the overhead
    of each example.
    """
    shape = maps_shape(model, request)
    n = 0 if request.method.is_one_row else min(shape[0], EXAMPLES_IN_PROGRESS * model.chunk_rows)
    n_elements = math.prod(input_shape(model, request.images))
    tensors_bytes = n * TENSORS_IN_PROGRESS * n_elements * model.kernel.dtype.itemsize
    # The pixels of each image, and then those of the whole batch.
    pixels_bytes = 0 if is_taken_as_it_is(model, request.images) else 2 * shape[0] * n_elements
    return math.prod(shape) * BYTES_OF_FLOAT32, tensors_bytes + pixels_bytes + shape[0] * BYTES_OF_EXAMPLE


def max_rows(request: Request, model: Model) -> int:
    """Return an upper bound of the rows that a request takes."""
    target = request.target
    rows = request.method.rows(input_shape(model, request.images))
    return maps_shape(model, request)[0] * rows * (target.k if isinstance(target, TopK) else 1)
