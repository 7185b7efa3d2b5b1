"""The settings of one model."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from ..errors import ConfigurationError
from .traits import ModelTraits

SOURCES = "python:package.module:factory, export:FILE.pt2, torchscript:FILE, hf:DIR or onnx:FILE"


class ModelSource(BaseModel):
    """The source of a model, and when to load it."""

    model: str = Field("", description=f"source of the model: {SOURCES}")
    weights: Path | None = Field(None, description="weights for it: .safetensors, or a weights-only .pt")
    load: Literal["eager", "lazy"] = Field("eager", description="load at start, or with the first request")


class ModelSettings(ModelTraits, ModelSource):
    """The settings of a model: source, traits, class names and limits."""

    class_names: Path | None = Field(None, description="a text file of class names, one a line, in the classes' order")

    max_chunk_rows: int = Field(
        0,
        ge=0,
        le=4096,
        description="largest number of rows that the device runs at once; 0: measured at load and again later",
    )
    max_chunk_s: float = Field(0.5, gt=0, description="seconds that a chunk may take, if its rows are measured")
    device_memory_limit: int = Field(
        0, ge=0, description="bytes that a chunk may take, if its rows are measured; 0: half of the free memory"
    )
    accept_partial_gradient: bool = Field(
        False, description="serve gradients although a check at load found that they are incomplete"
    )
    fidelity: float = Field(
        0.0,
        ge=0,
        le=1,
        description="least rank correlation with exact maps, measured at load, for the model to be served; 0: no check",
    )
    reproducible: bool = Field(
        False, description="the same bytes whatever the load, the index in the batch and the neighbors"
    )
    reproducible_rows: int = Field(
        1, ge=1, le=4096, description="rows of a reproducible chunk; more than 1 only if a check at load succeeds"
    )
    max_image_pixels: int = Field(50_000_000, ge=1, description="limit of height × width of an encoded image")
    max_decode_s: float = Field(5.0, gt=0, description="seconds of CPU time for decoding and resizing one image")
    max_example_rows: int = Field(10_000, ge=1, description="limit of the rows that a method takes for one example")
    max_model_in_flight: int = Field(
        0, ge=0, description="limit of batches in flight of one model; 0: only the limit of the server"
    )

    def traits(self) -> dict[str, Any]:
        """Return the traits that are set. Raises `ConfigurationError` if the file of class names cannot be read."""
        traits = {name: getattr(self, name) for name in ModelTraits.model_fields}
        if self.class_names is not None:
            traits["class_names"] = _read_names(self.class_names)
        # False is the default of a switch, so it does not override the spec.
        return {name: value for name, value in traits.items() if value is not None and value is not False}


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"class_names: {path}: {getattr(error, 'strerror', None) or error}") from None
