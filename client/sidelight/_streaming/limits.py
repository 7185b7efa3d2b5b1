"""Message limits: splits or rejects a batch that is too large for a message, before gRPC ends the stream for it."""

from collections.abc import Iterator

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from .._inputs.images import EncodedBatch
from ..exceptions import MessageTooLarge
from ..results.server_info import ServerInfo

_ITEM_BYTES = {tensor_pb2.DATA_TYPE_UINT8: 1, tensor_pb2.DATA_TYPE_FLOAT16: 2}
_FLOAT32_BYTES = 4
# Upper bounds for the rest of a message: id and lengths, provenance, a file's header, predictions of an example.
HEAD_BYTES = 256
PROVENANCE_BYTES = 2048
FILE_BYTES = 16
EXAMPLE_BYTES = 512


def fits(
    request: pb.AttributeRequest,
    batch: EncodedBatch,
    *,
    client_limit: int,
    server: ServerInfo,
    input_size: tuple[int, int, int] | None,
) -> bool:
    """Return whether a request fits into one message, and its answer's maps into one that the client takes.

    Raises `MessageTooLarge` for a single example that does not. `input_size` is the model's (C, H, W); None if it is
    not fixed.
    """
    try:
        _check_request_size(request.ByteSize(), client_limit=client_limit, server_limit=server.limits.max_message_bytes)
        _check_answer_size(map_bytes(request, batch, input_size), client_limit=client_limit)
    except MessageTooLarge:
        if len(batch) < 2:
            raise
        return False
    return len(batch) <= (server.limits.max_batch_examples or len(batch))


def split(
    template: pb.AttributeRequest,
    batch: EncodedBatch,
    *,
    client_limit: int,
    server: ServerInfo,
    input_size: tuple[int, int, int] | None,
    is_shared: bool = False,
) -> list[range]:
    """Return the ranges of examples into which a batch is split, to fit into messages and into `max_batch_examples`.

    Raises `MessageTooLarge` if a single example is too large. Sizes that the client does not know, such as the maps of
    a model without a fixed input size, are checked by the server. With `is_shared`, arrays travel in shared memory.
    """
    n, most = len(batch), server.limits.max_batch_examples or len(batch)
    maps_bytes = map_bytes(template, batch, input_size)
    if is_shared and server.shared_memory and batch.array is not None:
        return _split_for_regions(
            batch.array.nbytes + maps_bytes, n, most=most, limit=server.shared_memory.max_region_bytes
        )
    limit = min(client_limit, server.limits.max_message_bytes)
    head_bytes = template.ByteSize() + (batch.target.ByteSize() if batch.target else 0) + HEAD_BYTES
    sizes = [size + FILE_BYTES for size in batch.sizes()]
    if sum(sizes) + head_bytes <= limit and maps_bytes + PROVENANCE_BYTES + n * EXAMPLE_BYTES <= limit and n <= most:
        return [range(n)]
    _check_request_size(
        max(sizes, default=0) + head_bytes, client_limit=client_limit, server_limit=server.limits.max_message_bytes
    )
    _check_answer_size(maps_bytes // n, client_limit=client_limit)
    fitting = (limit - PROVENANCE_BYTES) // (maps_bytes // n + EXAMPLE_BYTES)
    return list(_pack(sizes, room=limit - head_bytes, most=max(1, min(most, fitting))))


def _split_for_regions(n_bytes: int, n: int, *, most: int, limit: int) -> list[range]:
    """Return the ranges of n examples of equal size that fit into a region; `n_bytes` is for all, with their maps."""
    fitting = min(most, limit // (n_bytes // n)) if n_bytes else most
    if n and not fitting:
        raise MessageTooLarge(
            f"an example and its maps take {n_bytes // n} bytes; max_region_bytes of the server is {limit}: "
            "start the server with a larger --max-region-bytes"
        )
    return [range(start, min(start + fitting, n)) for start in range(0, n, max(1, fitting))] or [range(n)]


def _pack(sizes: list[int], *, room: int, most: int) -> Iterator[range]:
    start = n_bytes = 0
    for index, size in enumerate(sizes):
        if index > start and (n_bytes + size > room or index - start >= most):
            yield range(start, index)
            start, n_bytes = index, 0
        n_bytes += size
    yield range(start, len(sizes))


def _check_request_size(n_bytes: int, *, client_limit: int, server_limit: int) -> None:
    if n_bytes > client_limit:
        raise MessageTooLarge(
            f"the request takes {n_bytes} bytes; max_message_bytes of this client's connect() is {client_limit}: "
            "send fewer examples, stream them, or raise it here and on the server"
        )
    if n_bytes > server_limit:
        raise MessageTooLarge(
            f"the request takes {n_bytes} bytes; max_message_bytes of the server is {server_limit}: "
            "send fewer examples, stream them, or start the server with a larger --max-message-bytes"
        )


def _check_answer_size(n_bytes: int, *, client_limit: int) -> None:
    if n_bytes > client_limit:
        raise MessageTooLarge(
            f"the answer's maps take {n_bytes} bytes; max_message_bytes of this client's connect() is {client_limit}: "
            "send fewer examples, stream them, or raise it here and on the server"
        )


def map_bytes(request: pb.AttributeRequest, batch: EncodedBatch, input_size: tuple[int, int, int] | None) -> int:
    """Return the bytes of all maps of a batch; 0 if they are not known."""
    keeps_channels = request.channels == pb.CHANNEL_REDUCTION_NONE
    target = request.target if batch.target is None else batch.target
    n_maps = max(1, target.top_k.k)
    item_bytes = _ITEM_BYTES.get(request.output.map_dtype, _FLOAT32_BYTES)
    return n_maps * item_bytes * batch.map_elements(input_size, keeps_channels=keeps_channels)
