"""Options of a model's kernel, for more speed at less accuracy.

Settings are read before torch is loaded, so this module must not import it.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Outputs = Literal["logits", "probabilities"]  # kind of the model's outputs
Activation = Literal["softmax", "sigmoid"]  # mutually exclusive classes, or independent ones
# Names of torch's types; "mixed" is float32 forward, and bfloat16 in the products of the backward pass.
Precision = Literal["float32", "mixed", "bfloat16", "float16"]


class KernelFields(BaseModel):
    """The options, as fields that other classes inherit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Precision | None = Field(
        None, description="type that the model computes in; mixed: bfloat16 only backward; unset: that of its weights"
    )
    fold: bool = Field(False, description="fold BatchNorm into convolutions: faster, other rounding")
    channels_last: bool = Field(False, description="use the channels-last memory format: faster on most CPUs and GPUs")
    compile: bool = Field(False, description="compile the model with torch.compile; needs a C compiler, and minutes")
    cuda_graphs: bool = Field(
        False, description="on a GPU: replay recorded kernels, for chunk sizes that are powers of two"
    )


class KernelOptions(KernelFields):
    """The kernel options of a model. By default none is set, and maps are exactly those of the module."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the options that are set, without the precision."""
        return tuple(name for name in ("fold", "channels_last", "compile", "cuda_graphs") if getattr(self, name))

    @property
    def is_exact(self) -> bool:
        """Whether no option is set."""
        return self == KernelOptions()

    def summary(self, precision: str) -> str:
        """Return the type and the options as text: "bfloat16+fold"."""
        return "+".join((precision, *self.names))
