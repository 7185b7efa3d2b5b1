"""Hypothesis strategies for requests: any message of the schema, nearly valid ones, and corrupted bytes."""

import functools
import io

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from PIL import Image
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight_server.interop.open_inference import inference_pb2 as oip

from support.messages.attribution import ask, floats
from support.messages.inference import infer_request
from support.models import LABELS

INTEGERS = [-(2**31), -1, 0, 1, 2, 3, 32, 99, 2**31 - 1]


# Names that some message gives a meaning, so that random ones get somewhere.
OF_INFERENCE = ["images", "maps", "score", "UINT8", "FP32", "BYTES", "sidelight_method", "sidelight_target", "timeout"]
PLACES = ["shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"]
WORDS = ["", "small", "smal", "cat", *LABELS]


SCALARS = {
    FieldDescriptor.CPPTYPE_UINT64: st.sampled_from([0, 1, 240, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_INT32: st.sampled_from(INTEGERS) | st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.sampled_from([-(2**63), *INTEGERS, 2**63 - 1]) | st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 7) | st.sampled_from(INTEGERS),
}


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4)).save(file, "PNG")
    return file.getvalue()


def value(field: FieldDescriptor, depth: int) -> st.SearchStrategy[object]:
    if field.type == FieldDescriptor.TYPE_STRING:
        one: st.SearchStrategy[object] = st.sampled_from(WORDS + OF_INFERENCE + PLACES) | st.text(max_size=8)
    elif field.type == FieldDescriptor.TYPE_BYTES:
        one = st.sampled_from([b"", b"\0" * 12, png(), png()[:40]]) | st.binary(max_size=64)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, of = field.message_type.fields
        return st.dictionaries(value(key, depth), value(of, depth), max_size=3)
    elif field.message_type is not None:
        one = anything(field.message_type, depth - 1)
    else:
        one = SCALARS[field.cpp_type]
    return st.lists(one, max_size=5) if field.is_repeated else one


@functools.cache
def anything(descriptor: Descriptor, depth: int = 4) -> st.SearchStrategy[Message]:
    """Any message of a type, with any fields set, to some depth."""
    chosen = {each.name: value(each, depth) for each in descriptor.fields if each.message_type is None or depth > 0}
    return st.fixed_dictionaries({}, optional=chosen).map(lambda fields: GetMessageClass(descriptor)(**fields))


@st.composite
def coherent_tensors(draw: st.DrawFn) -> tensor_pb2.Images:
    """A tensor whose data is as long as its shape says; its elements are any bits."""
    dtype, size = draw(st.sampled_from([(1, 1), (2, 2), (3, 2), (4, 4), (5, 8)]))
    shape = draw(
        st.sampled_from([[1, 3, 32, 32], [2, 3, 32, 32], [3, 32, 32], [0, 3, 32, 32], [1, 32, 32, 3], [2, 5, 7, 3]])
        | st.lists(st.integers(0, 4), max_size=5)
    )
    bits = draw(st.binary(min_size=1, max_size=16)) + b"\0\x3c"
    length = int(np.prod(shape)) * size
    data = (bits * (length // len(bits) + 1))[:length]
    return tensor_pb2.Images(tensor=tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data))


def nearly_good() -> st.SearchStrategy[pb.AttributeRequest]:
    """A good request in which some fields are anything."""
    by_name = pb.AttributeRequest.DESCRIPTOR.fields_by_name
    changes = {name: value(field, 4) for name, field in by_name.items() if name != "id"}
    changes["images"] = coherent_tensors() | changes["images"]
    pixels = np.zeros((1, 4, 4, 3), np.uint8)
    return st.fixed_dictionaries({"id": st.text(min_size=1, max_size=4)}, optional=changes).map(
        lambda fields: ask(pixels, **fields)
    )


@st.composite
def corrupted(draw: st.DrawFn) -> pb.AttributeRequest:
    """A request some of whose bytes are changed."""
    content = bytearray(draw(nearly_good()).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return parsed(bytes(content))


def parsed(content: bytes) -> pb.AttributeRequest:
    """Return the message that bytes encode; empty if they are invalid, because gRPC does not deliver those."""
    try:
        return pb.AttributeRequest.FromString(content)
    except DecodeError:
        return pb.AttributeRequest()


REQUESTS = anything(pb.AttributeRequest.DESCRIPTOR) | nearly_good() | corrupted() | st.binary(max_size=64).map(parsed)


STREAM_REQUESTS = REQUESTS.map(lambda request: pb.AttributeStreamRequest(attribute=request)) | anything(
    pb.AttributeStreamRequest.DESCRIPTOR
)


def nearly_good_inference() -> st.SearchStrategy[oip.ModelInferRequest]:
    """A good request of the Open Inference Protocol in which some fields, or some of its input, are anything."""

    def with_input(fields: dict[str, object], image: dict[str, object]) -> oip.ModelInferRequest:
        request = infer_request(floats(1), parameters=None)
        request.inputs[0].MergeFrom(type(request.inputs[0])(**image))
        for name in fields:
            request.ClearField(name)
        request.MergeFrom(oip.ModelInferRequest(**fields))
        return request

    changes = {each.name: value(each, 4) for each in oip.ModelInferRequest.DESCRIPTOR.fields}
    image = oip.ModelInferRequest.InferInputTensor.DESCRIPTOR
    return st.builds(
        with_input,
        st.fixed_dictionaries({}, optional=changes),
        st.fixed_dictionaries({}, optional={each.name: value(each, 4) for each in image.fields}),
    )


INFER_REQUESTS = anything(oip.ModelInferRequest.DESCRIPTOR) | nearly_good_inference()
