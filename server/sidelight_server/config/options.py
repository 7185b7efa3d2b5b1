"""Options of a model: how its outputs are read, and what makes its kernel faster but less exact.

The settings are made of these before torch is loaded, so nothing here may import it.
"""

from dataclasses import dataclass
from typing import Literal

Outputs = Literal["logits", "probabilities"]  # what a model returns
Activation = Literal["softmax", "sigmoid"]  # classes that exclude each other, or do not
Precision = Literal["float32", "bfloat16", "float16"]  # names of torch's types


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """None of these by default: then maps are those of the module as it is, to the last bit."""

    precision: Precision | None = None  # that the module computes in; None: its own
    fold: bool = False  # BatchNorm into the convolutions before it
    channels_last: bool = False
    compile: bool = False  # by torch.compile
    cuda_graphs: bool = False

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
