"""The traits of a model: its input, its outputs and its kernel's options.

They are fields both of `ModelSpec`, which a factory returns, and of `ModelSettings`, which an operator sets.
"""

import json
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode

from ..inputs.preprocessing import RESIZES, Interpolation, is_resize
from .options import Activation, KernelFields, Outputs, Precision


def _listed(value: object) -> object:
    """Return the items of a list in a variable, "3,224,224" or JSON, or of an array or tensor."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if not isinstance(value, str):
        return value
    is_json = value.startswith("[") and value.endswith("]")  # unlike "[::1]:50051"
    return json.loads(value) if is_json else [each.strip() for each in value.split(",")]


def _way_to_resize(value: int | str) -> int | str:
    if not is_resize(value):
        raise ValueError(f"expected {RESIZES}")
    return value


Listed = (NoDecode, BeforeValidator(_listed))
Constant = bool | int | float | str
_Length = Annotated[int, Field(ge=1)]


class ModelTraits(KernelFields):
    """The traits of a model. Unset ones are detected or have a default."""

    name: str | None = Field(
        None, description="name of the model in requests; unset: the name of its file, folder or module"
    )
    input_size: Annotated[tuple[_Length, _Length, _Length] | None, *Listed] = Field(
        None, description="C,H,W of the model's input; unset: floating arrays of any shape, neither files nor pixels"
    )
    trial_size: Annotated[tuple[_Length, _Length, _Length] | None, *Listed] = Field(
        None, description="C,H,W of a trial run at load, for models of any input size; unset: no trial run"
    )
    mean: Annotated[tuple[float, ...] | None, *Listed] = Field(
        None, description="one per channel, of pixels in pixel_range; unset: 0"
    )
    std: Annotated[tuple[float, ...] | None, *Listed] = Field(
        None, description="one per channel, of pixels in pixel_range; unset: 1"
    )
    pixel_range: Annotated[tuple[float, float] | None, *Listed] = Field(
        None, description="values that pixels 0 and 255 are scaled to before mean and std; unset: 0,1"
    )
    resize: Annotated[int | str, Field(union_mode="left_to_right"), AfterValidator(_way_to_resize)] | None = Field(
        None,
        description='short side in pixels before the center crop, or height and width, "256x256"; or "exact", those of '
        'the input; or "none"; unset: just covers the input',
    )
    interpolation: Interpolation | None = Field(None, description="the filter of resizing; unset: bilinear")
    window: Annotated[tuple[float, float] | None, *Listed] = Field(
        None, description="values of 16-bit and DICOM files that become black and white; unset: those of the file"
    )
    input: str | None = Field(None, description="the model's keyword that takes the images; unset: detected")
    arguments: dict[str, Constant] | None = Field(
        None, description="constants for other keywords of the model, as JSON or a table of the file"
    )
    label_argument: str | None = Field(
        None, description="the model's keyword for required labels; it gets zeros; unset: detected"
    )
    output_key: str | int | None = Field(
        None, description="key, attribute or index of the outputs in the model's return value; unset: detected"
    )
    output_kind: Outputs | None = Field(
        None, description="kind of the outputs, [N, K] or [N, K, h, w]; unset: detected"
    )
    activation: Activation | None = Field(
        None, description="softmax if classes are mutually exclusive, else sigmoid; unset: detected"
    )
    method_precision: dict[str, Precision] | None = Field(
        None,
        description="precision of single methods by name, as JSON or a table of the file; unset: that of the model",
    )
    layer_layout: dict[str, str] | None = Field(
        None,
        description='where positions lie in what layers return, "nchw", "nhwc" or "tokens:P:HxW" by layer, as JSON or '
        "a table of the file; for layers where it cannot be detected",
    )
