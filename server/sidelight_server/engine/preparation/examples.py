"""Preparation: images become model inputs, the target becomes class indices. Runs in worker threads."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...compute.passes.layer_hooks import NOTHING_TO_GUIDE
from ...domain import (
    MANY_EXAMPLES,
    PREDICTED,
    Array,
    Contrast,
    Dense,
    Files,
    PerExample,
    Predicted,
    Request,
    ResolvedTarget,
    Target,
    TopK,
)
from ...errors import Cancelled, FailedPrecondition, InvalidArgument, SidelightError
from ...inputs.decode_worker import Order, PictureOrder
from ...inputs.preprocessing import Geometry
from ...methods import Method
from ...methods.channels import Channels
from ...methods.grad_cam import LayerMethod
from ...methods.method import Rectifiers, Shape
from ...models.model import Model
from .decoder_process import Fitted

FEW_BYTES = 8 * 1024 * 1024  # the finiteness check takes 0.2 ms, as long as a worker thread's two wake-ups under load
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(slots=True)
class Prepared:
    """A request's examples, ready for the device; a failed example is its error."""

    examples: Sequence[Array | SidelightError]
    geometries: Sequence[Geometry | None]
    resolved_targets: Sequence[ResolvedTarget]
    top_k: int  # number of classes explained per example; 0: only its target
    shape: Shape  # of the model's input
    maps_shape: tuple[int, ...]
    baseline_digest: str  # SHA-256 in hexadecimal, if the request gave baselines as an array


def check(model: Model, request: Request, shape: Shape | None = None) -> list[ResolvedTarget]:
    """Check a request against a model and return each example's resolved target. Raises `SidelightError`.

    `shape` is that of the model's input, if it is known.
    """
    n, shape = request.n_examples, shape or input_shape(model, request.images)
    _check_score(model, request)
    request.method.check(shape, n)
    if request.method.largest_baseline > model.largest:
        raise InvalidArgument(
            f"method.{request.method.name}: a baseline of {request.method.largest_baseline:g}, the model's type holds "
            f"{model.largest:g} at most"
        )
    return _resolve_targets(model, request.target, n)


def order(model: Model) -> Order:
    """Return the decoding order for a model that has an input size."""
    assert model.preprocessing is not None  # noqa: S101  (`input_shape` has checked it)
    settings = model.settings
    return Order(model.preprocessing, max_pixels=settings.max_image_pixels, max_s=settings.max_decode_s)


def picture_order(
    model: Model, *, size: tuple[int, int], box: tuple[float, float, float, float] | None
) -> PictureOrder:
    """Return the order for a picture of a file that the model has an input size for; see `PictureOrder`."""
    fitting = order(model)
    return PictureOrder(fitting.preprocessing, fitting.max_pixels, fitting.max_s, size=size, box=box)


def prepare(
    model: Model,
    request: Request,
    *,
    is_gone: Callable[[], bool],
    shape: Shape | None = None,
    decoded: Sequence[Fitted] = (),
) -> Prepared:
    """Resize and check a request's examples. Raises `SidelightError` if the whole request is invalid.

    `shape` is that of the model's input, if it is known; `decoded` holds the decoded files. `is_gone` is called before
    each image is resized; if it returns True, because the client has disconnected, this raises `Cancelled`.
    """
    shape = shape or input_shape(model, request.images)
    resolved_targets = check(model, request, shape)
    fitted = decoded if isinstance(request.images, Files) else _fit(model, request.images, is_gone=is_gone)
    return Prepared(
        examples=[each if isinstance(each, SidelightError) else each[0] for each in fitted],
        geometries=[None if isinstance(each, SidelightError) else each[1] for each in fitted],
        resolved_targets=resolved_targets,
        top_k=_top_k(request.target),
        shape=shape,
        maps_shape=maps_shape(shape, request),
        baseline_digest=_digest(request.method.given_baselines),
    )


def resolve_layer(model: Model, request: Request, shape: Shape) -> Method:
    """Return the request's method with its layer resolved. `shape` is that of the model's input.

    Raises `InvalidArgument` if it takes more rows than allowed, `FailedPrecondition` if the method needs a gradient or
    rectifiers that the model does not have.
    """
    method = request.method
    if method.needs_gradient and not model.serves_gradients:
        raise FailedPrecondition(
            f'method.{method.name}: model "{model.name}" cannot be explained by gradients: {model.gradient_fault}; use '
            "occlusion or rise, which need none"
        )
    if method.probe is Rectifiers.GUIDED and not model.has_rectifiers:
        raise FailedPrecondition(NOTHING_TO_GUIDE)
    rows = method.rows(shape) * max(1, _top_k(request.target))
    if rows > model.settings.max_example_rows:
        raise InvalidArgument(
            f"method.{method.name}: it takes {rows} rows for one example, the server's max_example_rows is "
            f"{model.settings.max_example_rows}"
        )
    return replace(method, layer=model.layer(method.layer)) if isinstance(method, LayerMethod) else method


def runs_inline(model: Model, request: Request) -> bool:
    """Return whether preparation is so short that a worker thread would cost more than it saves."""
    images = request.images
    if isinstance(images, Files) or request.method.given_baselines is not None or len(images) > MANY_EXAMPLES:
        return False
    if images.dtype != np.uint8:
        return images.nbytes <= FEW_BYTES
    return needs_no_preparation(model, images)


def needs_no_preparation(model: Model, images: Files | Array) -> bool:
    """Return whether the examples need neither decoding nor resizing."""
    if isinstance(images, Files):
        return False
    fixed = model.preprocessing
    return images.dtype != np.uint8 or (fixed is not None and fixed.leaves(*images.shape[1:4]))


def needs_resizing(images: Files | Array) -> bool:
    """Return whether the examples are pixels, whose resizing may take long."""
    return not isinstance(images, Files) and images.dtype == np.uint8


def maps_shape(shape: Shape, request: Request) -> tuple[int, ...]:
    """Return the shape of the answer's maps: [N, H, W], with k after N for k targets, and C before H if not reduced."""
    of_map = shape if request.channels is Channels.NONE else shape[1:]
    k = _top_k(request.target)
    return (request.n_examples, k, *of_map) if k else (request.n_examples, *of_map)


def _fit(model: Model, images: Array, *, is_gone: Callable[[], bool]) -> list[Fitted]:
    if images.dtype != np.uint8:
        return [_check_example(each, largest=model.largest) for each in _to_dtype(images, model.staged_dtype)]
    preprocessing = model.preprocessing
    assert preprocessing is not None  # noqa: S101  (`input_shape` has checked it)
    fitted: list[Fitted] = []
    for each in images:
        if is_gone():
            raise Cancelled("the client has disconnected")
        fitted.append(preprocessing.fit(each))
    return fitted


def _to_dtype(images: Array, dtype: np.dtype[np.generic]) -> Array:
    if images.dtype == dtype:
        return images
    # Values that overflow the model's type become infinite and are rejected later. A signaling NaN would warn.
    with np.errstate(over="ignore", invalid="ignore"):
        return images.astype(dtype)


def _check_example(example: Array, *, largest: float) -> Fitted:
    if np.isfinite(example).all():
        if largest < FLOAT32_MAX and np.abs(example).max() > largest:
            return InvalidArgument(f"images: {np.abs(example).max():g}, the model's type holds {largest:g} at most")
        return example, None
    nan, infinite = int(np.isnan(example).sum()), int(np.isinf(example).sum())
    return InvalidArgument(f"images: {nan} NaN and {infinite} infinite elements, expected finite ones")


def input_shape(model: Model, images: Files | Array) -> Shape:
    """Return C, H, W of the model's input. Raises `InvalidArgument` if the images have another shape."""
    preprocessing = model.preprocessing
    fixed = (preprocessing.channels, preprocessing.height, preprocessing.width) if preprocessing else None
    if isinstance(images, Files) or images.dtype == np.uint8:
        if fixed is None:
            raise FailedPrecondition(
                f'images: model "{model.name}" has no input size, so it takes floating arrays [N, C, H, W] alone; '
                "its operator can set input_size"
            )
        return fixed
    c, h, w = images.shape[1:]
    if fixed and (c, h, w) != fixed:
        raise InvalidArgument(
            f'images: floating arrays of {[c, h, w]}, model "{model.name}" takes [C, H, W] = {list(fixed)}; '
            "send uint8 pixels [H, W, C] or files to have them resized"
        )
    return c, h, w


def _digest(array: Array | None) -> str:
    return "" if array is None else hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _top_k(target: Target) -> int:
    return target.k if isinstance(target, TopK) else 0


def _resolve_targets(model: Model, target: Target, n_examples: int) -> list[ResolvedTarget]:
    match target:
        case Predicted():
            return [PREDICTED] * n_examples
        case PerExample(choices):
            if len(choices) != n_examples:
                raise InvalidArgument(
                    f"target: {len(choices)} classes for {n_examples} examples, expected one for each"
                )
            return [ResolvedTarget(model.class_of(choice)) for choice in choices]
        case TopK(k):
            if k < 1 or (model.class_count and k > model.class_count):
                bound = f"1 to {model.class_count}" if model.class_count else "at least 1"
                raise InvalidArgument(f"target.top_k.k: got {k}, expected {bound}")
            return [PREDICTED] * n_examples
        case Contrast(positive, negative):
            return [ResolvedTarget(model.class_of(positive), model.class_of(negative))] * n_examples
        case Dense(choice, region):
            if len(model.output_shape) == 1 and target.needs_pixels:
                raise not_dense(model)
            if choice is None:
                return [ResolvedTarget(region=region, each_pixel=True)] * n_examples
            return [ResolvedTarget(model.class_of(choice), region=region)] * n_examples
        case choice:
            return [ResolvedTarget(model.class_of(choice))] * n_examples


def not_dense(model: Model) -> FailedPrecondition:
    """Return the error for a dense target of a model without dense output."""
    return FailedPrecondition(f'target.dense: model "{model.name}" returns scores for the whole image, not each pixel')


def _check_score(model: Model, request: Request) -> None:
    if request.score not in model.scores:
        has = ", ".join(score.value for score in model.scores)
        raise FailedPrecondition(
            f'score: model "{model.name}" returns {model.head.outputs}, so it has no {request.score.value}; '
            f"it has {has}"
        )
