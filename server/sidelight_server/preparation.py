"""Preparation: a request's images become what the device takes, its target becomes class numbers. In worker threads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .attribution import Array, Channels, Files, PerExample, Predicted, Request, Target
from .errors import Cancelled, FailedPrecondition, InvalidArgument, SidelightError
from .models.decoding import decode
from .models.model import Model
from .models.preprocessing import Geometry, Preprocessing
from .staging import is_finite

FLOAT32_MAX = float(np.finfo(np.float32).max)

_Fitted = tuple[Array, Geometry | None] | SidelightError


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request's examples, ready for the device, or why one of them is not."""

    examples: Sequence[Array | SidelightError]
    geometries: Sequence[Geometry | None]
    targets: Sequence[int | None]  # None is the predicted class
    shape: tuple[int, int, int]  # C, H, W of the model's input
    maps_shape: tuple[int, ...]


def prepare(model: Model, request: Request, *, max_pixels: int, is_gone: Callable[[], bool]) -> Prepared:
    """Decode, resize and check a request's examples. A `SidelightError` says what is wrong with all of it.

    `is_gone` is asked before each file, for decoding may take long and its caller may have left: then `Cancelled`.
    """
    targets = _targets(model, request.target, _n_examples(request.images))
    fitted = _fit(model, request.images, max_pixels=max_pixels, is_gone=is_gone)
    return Prepared(
        examples=[each if isinstance(each, SidelightError) else each[0] for each in fitted],
        geometries=[None if isinstance(each, SidelightError) else each[1] for each in fitted],
        targets=targets,
        shape=_input_shape(model, request.images),
        maps_shape=maps_shape(model, request),
    )


def needs_no_work(model: Model, images: Files | Array) -> bool:
    """Say whether examples are taken as they are, pixels of the input's size: a thread would cost more than save."""
    fixed = model.preprocessing
    if isinstance(images, Files) or images.dtype != np.uint8 or fixed is None:
        return False
    return fixed.leaves(*images.shape[1:3])


def needs_decoding(images: Files | Array) -> bool:
    """Say whether examples may take long: files are decoded, and pixels resized."""
    return isinstance(images, Files) or images.dtype == np.uint8


def maps_shape(model: Model, request: Request) -> tuple[int, ...]:
    """Return the shape of the answer's maps: [N, H, W], or [N, C, H, W] where the channels are kept."""
    c, h, w = _input_shape(model, request.images)
    n = _n_examples(request.images)
    return (n, c, h, w) if request.channels is Channels.NONE else (n, h, w)


def _fit(model: Model, images: Files | Array, *, max_pixels: int, is_gone: Callable[[], bool]) -> list[_Fitted]:
    if not isinstance(images, Files) and images.dtype != np.uint8:
        with np.errstate(over="ignore"):  # what the model's type cannot hold becomes infinite, and is refused as that
            staged = images.astype(model.staged_dtype, copy=False)
        return [_checked(each, largest=model.largest) for each in staged]
    preprocessing = model.preprocessing
    if preprocessing is None:
        raise FailedPrecondition(
            f'images: model "{model.name}" has no input size, so it takes floating arrays [N, C, H, W] alone; '
            "its operator can set input_size"
        )
    if isinstance(images, Files):
        return [_decoded(preprocessing, each, max_pixels=max_pixels, is_gone=is_gone) for each in images.files]
    return [preprocessing.fit(each) for each in images]


def _decoded(preprocessing: Preprocessing, file: bytes, *, max_pixels: int, is_gone: Callable[[], bool]) -> _Fitted:
    if is_gone():
        raise Cancelled("the caller has gone")
    try:
        return preprocessing.fit(decode(file, channels=preprocessing.channels, max_pixels=max_pixels))
    except InvalidArgument as error:
        return error


def _checked(example: Array, *, largest: float) -> _Fitted:
    if is_finite(example):
        if largest < FLOAT32_MAX and np.abs(example).max() > largest:
            return InvalidArgument(f"images: {np.abs(example).max():g}, the model's type holds {largest:g} at most")
        return example, None
    nan, infinite = int(np.isnan(example).sum()), int(np.isinf(example).sum())
    return InvalidArgument(f"images: {nan} NaN and {infinite} infinite elements, expected finite ones")


def _input_shape(model: Model, images: Files | Array) -> tuple[int, int, int]:
    """Return C, H, W of the model's input. `InvalidArgument` where the images have another shape."""
    preprocessing = model.preprocessing
    fixed = preprocessing and (preprocessing.channels, preprocessing.height, preprocessing.width)
    if isinstance(images, Files) or images.dtype == np.uint8:
        return fixed or (0, 0, 0)
    c, h, w = images.shape[1:]
    if fixed and (c, h, w) != fixed:
        raise InvalidArgument(
            f'images: floating arrays of {[c, h, w]}, model "{model.name}" takes [C, H, W] = {list(fixed)}; '
            "send uint8 pixels [H, W, C] or files to have them resized"
        )
    return c, h, w


def _n_examples(images: Files | Array) -> int:
    return len(images.files) if isinstance(images, Files) else len(images)


def _targets(model: Model, target: Target, n_examples: int) -> list[int | None]:
    match target:
        case Predicted():
            return [None] * n_examples
        case PerExample(choices):
            if len(choices) != n_examples:
                raise InvalidArgument(
                    f"target: {len(choices)} classes for {n_examples} examples, expected one for each"
                )
            return [model.class_of(choice) for choice in choices]
        case choice:
            return [model.class_of(choice)] * n_examples
