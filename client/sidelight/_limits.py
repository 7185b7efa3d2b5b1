"""Limits of messages: what either side would refuse is not sent, for gRPC would end a whole stream for it."""

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ._errors import MessageTooLarge
from ._images import Batch

_ITEM_BYTES = {tensor_pb2.DATA_TYPE_UINT8: 1, tensor_pb2.DATA_TYPE_FLOAT16: 2}
_FLOAT32_BYTES = 4


def refuse_large(
    request: pb.AttributeRequest, batch: Batch, *, ours: int, theirs: int, input_size: tuple[int, int, int] | None
) -> None:
    """Raise `MessageTooLarge` for a request over either side's `max_message_bytes`, or whose answer is over ours.

    `input_size` is the model's C, H, W; None where it is not fixed.
    """
    n_bytes = request.ByteSize()
    if n_bytes > ours:
        raise MessageTooLarge(
            f"the request takes {n_bytes} bytes; max_message_bytes of this client's connect() is {ours}: "
            "send fewer examples, or raise it here and on the server"
        )
    if n_bytes > theirs:
        raise MessageTooLarge(
            f"the request takes {n_bytes} bytes; max_message_bytes of the server is {theirs}: "
            "send fewer examples, or start the server with a larger --max-message-bytes"
        )
    n_bytes = _map_bytes(request) * batch.map_elements(
        input_size, keeps_channels=request.channels == pb.CHANNEL_REDUCTION_NONE
    )
    if n_bytes > ours:
        raise MessageTooLarge(
            f"the answer's maps take {n_bytes} bytes; max_message_bytes of this client's connect() is {ours}: "
            "send fewer examples, or raise it here and on the server"
        )


def _map_bytes(request: pb.AttributeRequest) -> int:
    """Return how many bytes each element of an example's map takes, over all of its maps."""
    n_maps = max(1, request.target.top_k.k)
    return n_maps * _ITEM_BYTES.get(request.output.map_dtype, _FLOAT32_BYTES)
