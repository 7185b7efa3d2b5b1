"""Options of the kernel: what an operator may choose to be faster, at the cost of a map's last digits."""

from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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

    def told(self, precision: str) -> str:
        """Return what runs, in a word: "bfloat16+fold"."""
        return "+".join((precision, *self.names))
