"""Requests: translates a ModelInferRequest to an equivalent `AttributeRequest`."""

from collections.abc import Sequence
from dataclasses import dataclass

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ...errors import InvalidArgument, NotFound, did_you_mean
from . import inference_pb2 as oip
from . import outputs, parameters, tensors

IMAGES = "images"  # the one input
REGION, SIZE, OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"


@dataclass(frozen=True, slots=True)
class Shared:
    """A part of a registered region of shared memory, in bytes. `field` names it in errors."""

    region: str
    offset: int
    n_bytes: int
    field: str


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """A requested output, and where it is written unless in the answer."""

    name: str
    shared: Shared | None = None


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A translated request. `message` and `data` are those of `RequestHandler.validate`.

    Encoded files in shared memory are not in the message yet: `files` says where they are.
    """

    message: pb.AttributeRequest
    data: memoryview | None
    outputs: tuple[RequestedOutput, ...]
    images: Shared | None = None  # where a tensor is in shared memory
    files: Shared | None = None
    n_files: int = 0

    @property
    def maps(self) -> Shared | None:
        """Where the maps are written, unless in the answer."""
        return next((each.shared for each in self.outputs if each.name == outputs.MAPS), None)

    def with_files(self, data: memoryview) -> "InferRequest":
        """Put files that were read from shared memory into the message."""
        self.message.images.encoded.files.extend(tensors.unpack_files(data, self.n_files, field=IMAGES))
        return self


def translate(request: oip.ModelInferRequest, data: memoryview | None) -> InferRequest:
    """Translate a request. `data` is its only raw content if the codec cut it out of the message.

    Raises `InvalidArgument` or `NotFound`, which name the field.
    """
    message = pb.AttributeRequest(id=request.id, model=request.model_name)
    parameters.fill_in(message, request.parameters)
    requested = _outputs(request.outputs)
    message.output.probabilities = any(each.name == outputs.PROBABILITIES for each in requested)
    if any(each.name == outputs.RENDERED for each in requested):
        message.output.rendered.SetInParent()  # as by default: the overlay, in the input's size
    if maps := next((each.shared for each in requested if each.name == outputs.MAPS), None):
        message.output.region.CopyFrom(tensor_pb2.SharedTensor(region=maps.region, offset_bytes=maps.offset))
    image = _single_input(request.inputs)
    shared = _shared(image.parameters, f"inputs.{IMAGES}.parameters")
    raw = [data] if data is not None else [memoryview(each) for each in request.raw_input_contents]
    if raw and len(raw) != (shared is None):
        raise InvalidArgument(
            f"raw_input_contents: {len(raw)} entries, expected one for each input outside shared memory, which are "
            f"{int(shared is None)}"
        )
    if (raw or shared) and image.HasField("contents"):
        raise InvalidArgument(f"inputs.{IMAGES}.contents: set beside raw_input_contents or a region, expected one")
    if image.datatype == tensors.FILES:
        return _with_files(message, image, raw, shared, requested)
    dtype = _dtype(image.datatype)
    if shared:
        message.images.shared.CopyFrom(
            tensor_pb2.SharedTensor(region=shared.region, offset_bytes=shared.offset, dtype=dtype, shape=image.shape)
        )
        return InferRequest(message, None, requested, images=shared)
    message.images.tensor.CopyFrom(tensor_pb2.Tensor(dtype=dtype, shape=image.shape))
    elements = raw[0] if raw else tensors.elements(image.contents, image.datatype, field=f"inputs.{IMAGES}")
    return InferRequest(message, elements, requested)


def _with_files(
    message: pb.AttributeRequest,
    image: oip.ModelInferRequest.InferInputTensor,
    raw: list[memoryview],
    shared: Shared | None,
    requested: tuple[RequestedOutput, ...],
) -> InferRequest:
    n = tensors.n_files(image.shape, field=IMAGES)
    message.images.encoded.SetInParent()
    if shared:
        return InferRequest(message, None, requested, files=shared, n_files=n)
    files = tensors.unpack_files(raw[0], n, field=IMAGES) if raw else image.contents.bytes_contents
    if len(files) != n:
        raise InvalidArgument(f"inputs.{IMAGES}.contents.bytes_contents: {len(files)} elements, but shape has {n}")
    message.images.encoded.files.extend(files)
    return InferRequest(message, None, requested)


def _single_input(inputs: Sequence[oip.ModelInferRequest.InferInputTensor]) -> oip.ModelInferRequest.InferInputTensor:
    names = [each.name for each in inputs[:8]]
    if names != [IMAGES]:
        raise InvalidArgument(f'inputs: got {names or "none"}, expected one input, "{IMAGES}"')
    return inputs[0]


def _dtype(datatype: str) -> tensor_pb2.DataType.ValueType:
    if datatype not in tensors.IMAGE_TYPES:
        expected = ", ".join((*tensors.IMAGE_TYPES, tensors.FILES))
        raise InvalidArgument(f"inputs.{IMAGES}.datatype: got {datatype[:32]!r}, expected one of {expected}")
    return tensors.IMAGE_TYPES[datatype]


def _outputs(requested: Sequence[oip.ModelInferRequest.InferRequestedOutputTensor]) -> tuple[RequestedOutput, ...]:
    """Return the requested outputs; all but the pictures if none is named."""
    if not requested:
        return tuple(map(RequestedOutput, outputs.DEFAULT))
    seen: dict[str, RequestedOutput] = {}
    for each in requested:
        if each.name not in outputs.OUTPUTS:
            raise NotFound(f'outputs: there is no "{each.name[:64]}"; {did_you_mean(each.name, outputs.OUTPUTS)}')
        if each.name in seen:
            raise InvalidArgument(f'outputs: "{each.name}" is requested twice')
        field = f"outputs.{each.name}.parameters"
        if parameters.integer(each.parameters, "classification", field=field):
            raise InvalidArgument(f"{field}.classification: not served; request the output {outputs.PROBABILITIES}")
        seen[each.name] = RequestedOutput(each.name, _shared(each.parameters, field))
    return tuple(seen.values())


def _shared(given: parameters.Parameters, field: str) -> Shared | None:
    region = parameters.string(given, REGION, field=field)
    if not region:
        return None
    n_bytes = parameters.integer(given, SIZE, field=field)
    offset = parameters.integer(given, OFFSET, field=field)
    if n_bytes < 0 or not 0 <= offset < 2**63:
        raise InvalidArgument(f"{field}: {SIZE} {n_bytes}, {OFFSET} {offset}; expected none negative")
    return Shared(region, offset, n_bytes, field)
