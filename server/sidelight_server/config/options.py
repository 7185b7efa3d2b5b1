"""Options of a model's kernel: faster, and less exact.

The settings are made of these before torch is loaded, so nothing here may import it.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Outputs = Literal["logits", "probabilities"]  # what a model returns
Activation = Literal["softmax", "sigmoid"]  # classes that exclude each other, or do not
Precision = Literal["float32", "bfloat16", "float16"]  # names of torch's types


class KernelFields(BaseModel):
    """The options, as fields of whatever has them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Precision | None = Field(
        None, description="type that the model computes in; unset: that of its weights; half precision: rougher maps"
    )
    fold: bool = Field(False, description="fold BatchNorm into convolutions: faster, other rounding")
    channels_last: bool = Field(False, description="lay pictures out by pixel: faster on most CPUs and GPUs")
    compile: bool = Field(False, description="compile the model with torch.compile; needs a C compiler, and minutes")
    cuda_graphs: bool = Field(False, description="on a GPU: replay recorded kernels for a ladder of chunk sizes")


class KernelOptions(KernelFields):
    """None of these by default: then maps are those of the module as it is, to the last bit."""

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are chosen, but the precision."""
        return tuple(name for name in ("fold", "channels_last", "compile", "cuda_graphs") if getattr(self, name))

    @property
    def is_exact(self) -> bool:
        """Whether none is chosen."""
        return self == KernelOptions()

    def summary(self, precision: str) -> str:
        """Return what runs, in a word: "bfloat16+fold"."""
        return "+".join((precision, *self.names))
