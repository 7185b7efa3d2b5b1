"""What an operator can set of one model."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import NoDecode

from ..errors import ConfigurationError
from ..inputs.preprocessing import RESIZES, Interpolation, is_resize
from .options import Activation, Outputs, Precision
from .spec import ModelSpec

SOURCES = "python:package.module:factory, export:FILE.pt2, torchscript:FILE, hf:DIR or onnx:FILE"


def _split(value: object) -> object:
    """Return the items of a list as a variable holds it: "3,224,224", or JSON. Flags and the file bring lists."""
    if not isinstance(value, str):
        return value
    is_json = value.startswith("[") and value.endswith("]")  # unlike "[::1]:50051"
    return json.loads(value) if is_json else [each.strip() for each in value.split(",")]


def _way_to_resize(value: int | str) -> int | str:
    if not is_resize(value):
        raise ValueError(f"expected {RESIZES}")
    return value


Listed = (NoDecode, BeforeValidator(_split))


class ModelSettings(BaseModel):
    """What an operator can set of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("", description=f"where the model comes from: {SOURCES}")
    weights: Path | None = Field(None, description="weights for it: .safetensors, or a weights-only .pt")
    name: str | None = Field(
        None, description="what requests call the model; if unset, the name of its file, folder or module"
    )
    load: Literal["eager", "lazy"] = Field("eager", description="load at start, or when the first request comes")
    input_size: Annotated[tuple[int, int, int] | None, *Listed] = Field(
        None, description="C,H,W of the model's input; unset: floating arrays of any shape, neither files nor pixels"
    )
    trial_size: Annotated[tuple[int, int, int] | None, *Listed] = Field(
        None, description="C,H,W that a model of any input size is tried with when it is loaded; unset: it is not tried"
    )
    mean: Annotated[tuple[float, ...] | None, *Listed] = Field(
        None, description="one for each channel, of pixels in pixel_range; unset: 0"
    )
    std: Annotated[tuple[float, ...] | None, *Listed] = Field(
        None, description="one for each channel, of pixels in pixel_range; unset: 1"
    )
    pixel_range: Annotated[tuple[float, float] | None, *Listed] = Field(
        None, description="what pixels 0 and 255 are scaled to before the mean is subtracted; unset: 0,1"
    )
    resize: Annotated[int | str, Field(union_mode="left_to_right"), AfterValidator(_way_to_resize)] | None = Field(
        None,
        description='short side in pixels before the centre crop, or height and width, "256x256"; or "exact", those of '
        'the input; or "none"; unset: just covers the input',
    )
    interpolation: Interpolation | None = Field(None, description="the filter of resizing; unset: bilinear")
    window: Annotated[tuple[float, float] | None, *Listed] = Field(
        None, description="values of 16-bit and DICOM files that become black and white; unset: as the file says"
    )
    input: str | None = Field(None, description="the model's keyword that takes the images; unset: found out")
    arguments: dict[str, bool | int | float | str] | None = Field(
        None, description="constants for other keywords of the model, as JSON or a table of the file"
    )
    label: str | None = Field(None, description="a keyword that demands labels, and gets zeros; unset: found out")
    output: str | int | None = Field(
        None, description="key, attribute or place of the outputs in what the model returns; unset: found out"
    )
    outputs: Outputs | None = Field(None, description="what they are, [N, K] or [N, K, h, w]; unset: found out")
    activation: Activation | None = Field(
        None, description="softmax where classes exclude each other, sigmoid where they do not; unset: found out"
    )
    layer_layout: dict[str, str] | None = Field(
        None,
        description='where positions lie in what layers return, "nchw", "nhwc" or "tokens:P:HxW" by layer, as JSON or '
        "a table of the file; for layers where that cannot be found out",
    )
    labels: Path | None = Field(None, description="a text file of class names, one a line, in the classes' order")

    max_chunk_rows: int = Field(
        0, ge=0, le=4096, description="rows that the device runs at once, at most; 0: measured at load, and later again"
    )
    max_chunk_s: float = Field(0.5, gt=0, description="seconds that a chunk may take, where its rows are measured")
    device_memory_limit: int = Field(
        0,
        ge=0,
        description="bytes that a chunk may take, where that is measured; 0: half of what is free",
    )
    precision: Precision | None = Field(
        None, description="type that the model computes in; unset: that of its weights; half precision: rougher maps"
    )
    fold: bool = Field(False, description="fold BatchNorm into convolutions: faster, other rounding")
    channels_last: bool = Field(False, description="lay pictures out by pixel: faster on most CPUs and GPUs")
    compile: bool = Field(False, description="compile the model with torch.compile; needs a C compiler, and minutes")
    cuda_graphs: bool = Field(False, description="on a GPU: replay recorded kernels for a ladder of chunk sizes")
    accept_partial_gradient: bool = Field(
        False,
        description="serve gradients that miss a part of what the outputs do, as a check at load says",
    )
    reproducible: bool = Field(False, description="the same bytes whatever the load, the place and the company")
    reproducible_rows: int = Field(
        1, ge=1, le=4096, description="rows of a reproducible chunk; more than 1 only where a check at load shows it"
    )
    max_image_pixels: int = Field(50_000_000, ge=1, description="height × width of an encoded picture")
    max_decode_s: float = Field(
        5.0, gt=0, description="seconds of CPU time that one encoded picture may take, decoded and resized"
    )
    max_example_rows: int = Field(10_000, ge=1, description="rows that a method may ask for one example")
    max_model_in_flight: int = Field(0, ge=0, description="batches at work at once for one model; 0: no more limit")

    def traits(self) -> dict[str, Any]:
        """Return what completes a model's specification. `ConfigurationError` where labels cannot be read."""
        names = {field.name for field in fields(ModelSpec)} & set(ModelSettings.model_fields) - {"labels"}
        # A switch that is off says nothing against a specification's own.
        said = {name: value for name in names if (value := getattr(self, name)) is not False}
        return said | {"labels": _read_labels(self.labels)}


def _read_labels(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"labels: {path}: {getattr(error, 'strerror', None) or error}") from None
