"""The linear model of the test server, with gradients in closed form, and its answers."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, tensor_pb2

from .._inputs.tensors import array_of
from ..exceptions import InvalidArgument, Unimplemented

MODEL = "linear"
SIDE = 32  # pixels to which files are resized
MAX_EXAMPLES = 4096
_FILE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

Floats = NDArray[np.float64]


class Linear:
    """A linear model with softmax."""

    def __init__(self, labels: tuple[str, ...], n_classes: int) -> None:
        self.labels = labels
        self.n_classes = n_classes

    def weights(self, height: int, width: int) -> Floats:
        """Return w, [K, H, W]: a wave per class, each of its own direction and length, the same for all channels."""
        k = np.arange(1, self.n_classes + 1)[:, None, None]
        rows, columns = np.arange(height)[:, None] / height, np.arange(width) / width
        return np.cos(2 * np.pi * k * (rows + (1 + k % 3) * columns)) * 8.0

    def probabilities(self, images: Floats, weights: Floats) -> Floats:
        """Return softmax probabilities, [N, K], of images [N, C, H, W]."""
        n_elements = images[0].size if len(images) else 1
        logits = np.einsum("nchw,khw->nk", images, weights) / n_elements
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    def gradient(self, probabilities: Floats, target: int, weights: Floats, n_channels: int) -> Floats:
        """Return d p[target] / d x, [C, H, W], at one example's probabilities [K]."""
        one = probabilities[target] * (weights[target] - np.tensordot(probabilities, weights, 1))
        return np.repeat((one / (n_channels * one.size))[None], n_channels, axis=0)

    def info(self) -> model_pb2.ModelInfo:
        return model_pb2.ModelInfo(
            name=MODEL, version=1, digest="testing", state=model_pb2.MODEL_STATE_SERVING,
            class_count=self.n_classes, labels=self.labels, scores=[model_pb2.SCORE_PROBABILITY],
            precision="float32", device="cpu", chunk_rows=16, reproducible=True,
        )  # fmt: skip

    def index(self, choice: pb.ClassChoice, field: str) -> int:
        """Return a class's index. `InvalidArgument` for an unknown class."""
        if choice.WhichOneof("choice") == "label":
            if choice.label not in self.labels:
                raise InvalidArgument(f'{field}: the model has no label "{choice.label}"')
            return self.labels.index(choice.label)
        if not 0 <= choice.index < self.n_classes:
            raise InvalidArgument(f"{field}: got {choice.index}, expected 0 to {self.n_classes - 1}")
        return choice.index

    def label(self, index: int) -> str:
        """Return a class's label; empty if the model has no labels."""
        return self.labels[index] if self.labels else ""


class Answer:
    """The answer to one request. `InvalidArgument` for invalid images."""

    def __init__(self, model: Linear, request: pb.AttributeRequest) -> None:
        self._model = model
        self._request = request
        self._images, self._failures = _images(request.images)
        self._weights = model.weights(*self._images.shape[2:])
        self._probabilities = model.probabilities(self._images, self._weights)  # [N, K]

    def attribution(self) -> pb.Attribution:
        """Return the answer. `InvalidArgument` for an invalid target."""
        request = self._request
        kind = request.target.WhichOneof("target")
        n_served = len(request.served_classes.classes)
        if request.HasField("served_classes") and n_served != len(self._images):
            raise InvalidArgument(
                f"served_classes: got {n_served} classes, expected one for each of {len(self._images)} examples"
            )
        gradients = [self._gradients(i) for i in range(len(self._images))]
        maps = self._maps(np.stack(gradients) if gradients else np.empty((0, 1, *self._images.shape[1:])))
        if kind != "top_k":
            maps = maps[:, 0]  # [N, H, W], or [N, C, H, W] with all channels
        result = pb.Attribution(
            maps=_encoded(maps, request.output.map_dtype),
            examples=[self._example(i) for i in range(len(self._images))],
            failures=[
                pb.ExampleFailure(example=i, code=InvalidArgument.code, message=message)
                for i, message in sorted(self._failures.items())
            ],
            provenance=pb.Provenance(
                model=MODEL, model_version=1, model_digest="testing", method=request.method, target=request.target,
                score=model_pb2.SCORE_PROBABILITY, channels=request.channels, precision="float32", device="cpu",
                threads=1, chunk_rows=16, reproducible=True,
            ),
            timing=pb.Timing(),
            transport=pb.TRANSPORT_INLINE,
            final=True,
        )  # fmt: skip
        if request.output.probabilities:
            result.probabilities.CopyFrom(_encoded(self._probabilities, tensor_pb2.DATA_TYPE_FLOAT32))
        return result

    def _targets(self, i: int) -> list[tuple[int, int | None]]:
        """Return the explained classes of example i, each with the negative class of a contrast, or None."""
        target, model = self._request.target, self._model
        match target.WhichOneof("target"):
            case "predicted":
                return [(int(self._probabilities[i].argmax()), None)]
            case "index":
                return [(model.index(pb.ClassChoice(index=target.index), "target.index"), None)]
            case "label":
                return [(model.index(pb.ClassChoice(label=target.label), "target.label"), None)]
            case "per_example":
                if len(target.per_example.classes) != len(self._images):
                    raise InvalidArgument(
                        f"target: got {len(target.per_example.classes)} classes, expected one for each of "
                        f"{len(self._images)} examples"
                    )
                return [(model.index(target.per_example.classes[i], f"target[{i}]"), None)]
            case "top_k":
                if not 1 <= target.top_k.k <= model.n_classes:
                    raise InvalidArgument(f"target.top_k: got {target.top_k.k}, expected 1 to {model.n_classes}")
                return [(int(k), None) for k in np.argsort(-self._probabilities[i])[: target.top_k.k]]
            case "contrast":
                positive = model.index(target.contrast.positive, "target.positive")
                return [(positive, model.index(target.contrast.negative, "target.negative"))]
            case _:
                raise Unimplemented(
                    f"target: {target.WhichOneof('target') or 'none'} is not supported by the test server"
                )

    def _gradients(self, i: int) -> Floats:
        """Return the gradients of example i's targets, [k, C, H, W]; NaN if the example failed."""
        gradients = np.stack([self._gradient(i, index, against) for index, against in self._targets(i)])
        return np.full_like(gradients, np.nan) if i in self._failures else gradients

    def _maps(self, gradients: Floats) -> Floats:
        """Reduce the channels of gradients, [N, k, C, H, W], as requested: [N, k, H, W], or unchanged for "none"."""
        match self._request.channels:
            case pb.CHANNEL_REDUCTION_NONE:
                return gradients
            case pb.CHANNEL_REDUCTION_SUM:
                return np.asarray(gradients.sum(axis=2))
            case pb.CHANNEL_REDUCTION_MEAN_ABS:
                return np.asarray(np.abs(gradients).mean(axis=2))
            case pb.CHANNEL_REDUCTION_L2:
                return np.asarray(np.sqrt((gradients**2).sum(axis=2)))
            case _:
                return np.asarray(np.abs(gradients).max(axis=2))

    def _gradient(self, i: int, index: int, against: int | None) -> Floats:
        arguments = self._weights, self._images.shape[1]
        one = self._model.gradient(self._probabilities[i], index, *arguments)
        return one if against is None else one - self._model.gradient(self._probabilities[i], against, *arguments)

    def _example(self, i: int) -> pb.Example:
        if i in self._failures:
            return pb.Example()
        probabilities, model = self._probabilities[i], self._model
        predicted = int(probabilities.argmax())
        example = pb.Example(
            prediction=pb.Prediction(
                index=predicted, label=model.label(predicted), probability=probabilities[predicted]
            ),
            targets=[
                pb.ExplainedTarget(
                    index=index, label=model.label(index), against=against,
                    score=probabilities[index] - (0.0 if against is None else probabilities[against]),
                )
                for index, against in self._targets(i)
            ],
        )  # fmt: skip
        if self._request.HasField("served_classes"):
            served = self._request.served_classes.classes[i]
            example.is_mismatch = model.index(served, f"served_classes[{i}]") != predicted
        return example


def _images(images: tensor_pb2.Images) -> tuple[Floats, dict[int, str]]:
    """Return a request's images, [N, C, H, W] in 0…1, and the error of each file that cannot be decoded."""
    match images.WhichOneof("source"):
        case "tensor":
            return _elements(images.tensor), {}
        case "encoded":
            files = [_file(file) for file in images.encoded.files]
            failures = {i: file for i, file in enumerate(files) if isinstance(file, str)}
            empty = np.zeros((3, SIDE, SIDE))
            pixels = [empty if isinstance(file, str) else file for file in files]
            return np.stack(pixels) if pixels else np.zeros((0, 3, SIDE, SIDE)), failures
        case _:
            raise InvalidArgument("images: got none, expected a tensor or files")


def _elements(tensor: tensor_pb2.Tensor) -> Floats:
    try:
        array: NDArray[Any] = array_of(tensor)
    except (ValueError, StopIteration) as error:
        raise InvalidArgument(
            f"images: shape {list(tensor.shape)} and {len(tensor.data)} bytes do not match"
        ) from error
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or 0 in array.shape[1:]:
        raise InvalidArgument(
            f"images.shape: {list(tensor.shape)}, expected [N, H, W, C] pixels or [N, C, H, W] floats"
        )
    if len(array) > MAX_EXAMPLES:
        raise InvalidArgument(f"images: {len(array)} examples, expected at most {MAX_EXAMPLES} in a batch")
    return array.transpose(0, 3, 1, 2) / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)


def _file(file: bytes) -> Floats | str:
    """Return a file's pixels, [3, H, W], or an error message."""
    try:
        picture = Image.open(io.BytesIO(file)).convert("RGB").resize((SIDE, SIDE))
    except _FILE_ERRORS as error:
        return f"image file: cannot decode {len(file)} bytes: {error}"
    return np.asarray(picture).transpose(2, 0, 1) / 255.0


def _encoded(array: Floats, dtype: tensor_pb2.DataType.ValueType) -> tensor_pb2.Tensor:
    """Convert maps or probabilities to a message. float16 and uint8 are scaled by each example's largest value."""
    if dtype not in (tensor_pb2.DATA_TYPE_UINT8, tensor_pb2.DATA_TYPE_FLOAT16):
        data = array.astype("<f4").tobytes()
        return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=array.shape, data=data)
    scales = np.nan_to_num(np.abs(array).max(axis=tuple(range(1, array.ndim)), initial=0.0))  # [N]
    if dtype == tensor_pb2.DATA_TYPE_UINT8:
        scales /= 255
    scales[scales == 0] = 1.0
    shares = array / scales.reshape(-1, *(1,) * (array.ndim - 1))
    if dtype == tensor_pb2.DATA_TYPE_UINT8:
        data = np.rint(np.nan_to_num(np.maximum(shares, 0))).astype(np.uint8).tobytes()
    else:
        data = shares.astype("<f2").tobytes()
    return tensor_pb2.Tensor(dtype=dtype, shape=array.shape, data=data, scales=scales)
