"""What an operator can set of one model."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from ..errors import ConfigurationError
from .traits import ModelTraits

SOURCES = "python:package.module:factory, export:FILE.pt2, torchscript:FILE, hf:DIR or onnx:FILE"


class ModelSource(BaseModel):
    """Where a model comes from, and when."""

    model: str = Field("", description=f"where the model comes from: {SOURCES}")
    weights: Path | None = Field(None, description="weights for it: .safetensors, or a weights-only .pt")
    load: Literal["eager", "lazy"] = Field("eager", description="load at start, or when the first request comes")


class ModelSettings(ModelTraits, ModelSource):
    """What an operator can set of a model: its source, its traits, its class names and its limits."""

    class_names: Path | None = Field(None, description="a text file of class names, one a line, in the classes' order")

    max_chunk_rows: int = Field(
        0, ge=0, le=4096, description="rows that the device runs at once, at most; 0: measured at load, and later again"
    )
    max_chunk_s: float = Field(0.5, gt=0, description="seconds that a chunk may take, where its rows are measured")
    device_memory_limit: int = Field(
        0,
        ge=0,
        description="bytes that a chunk may take, where that is measured; 0: half of what is free",
    )
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
        """Return what completes a model's specification. `ConfigurationError` where class names cannot be read."""
        said = {name: getattr(self, name) for name in ModelTraits.model_fields}
        if self.class_names is not None:
            said["class_names"] = _read_names(self.class_names)
        # A switch that is off says nothing against a specification's own.
        return {name: value for name, value in said.items() if value is not None and value is not False}


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"class_names: {path}: {getattr(error, 'strerror', None) or error}") from None
