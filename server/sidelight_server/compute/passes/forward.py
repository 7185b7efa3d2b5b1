"""The forward pass: runs a module on inputs in the type and memory format that the options set."""

import contextlib

import torch
from torch import Tensor, nn

from ...config.options import KernelOptions
from .adapter import Adapter
from .bfloat16_backward import Bfloat16Backward


class Forward:
    """Runs modules through an adapter. Inputs stay as they are, whatever the module does in place.

    Inputs and outputs have the type `dtype`; the module computes in `compute_dtype`.
    """

    def __init__(
        self, adapter: Adapter, options: KernelOptions, *, dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> None:
        self.adapter = adapter
        self._options = options
        self._dtype = dtype
        self._compute_dtype = compute_dtype
        self.backward = Bfloat16Backward() if options.precision == "mixed" else None
        self._copies_inputs: bool | None = None  # whether the module writes to its input; None: not known yet

    def __call__(self, inputs: Tensor, module: nn.Module, *, copies: bool = False) -> Tensor:
        """Return the module's outputs, [n, K] or [n, K, h, w], for inputs [n, C, H, W] or a copy of them."""
        with self.backward or contextlib.nullcontext():
            outputs = self.adapter(module, self._convert(inputs.clone())) if copies else self._run(inputs, module)
        return outputs.to(self._dtype) if self._options.precision else outputs

    def _convert(self, inputs: Tensor) -> Tensor:
        """Convert inputs to the module's type and memory format; returns the same tensor if they have both."""
        if not self._options.channels_last:
            return inputs.to(self._compute_dtype)
        return inputs.to(self._compute_dtype, memory_format=torch.channels_last)

    def _run(self, inputs: Tensor, module: nn.Module) -> Tensor:
        """Run the module, on a copy of the inputs if it modifies them in place: the points must not change."""
        converted = self._convert(inputs)
        if converted is not inputs or self._copies_inputs:
            return self.adapter(module, inputs.clone() if converted is inputs else converted)
        if inputs.requires_grad:
            try:
                return self.adapter(module, inputs)
            except RuntimeError as error:
                if "a leaf Variable that requires grad" not in str(error):
                    raise
            self._copies_inputs = True
            return self.adapter(module, inputs.clone())
        if self._copies_inputs is False:
            return self.adapter(module, inputs)
        copied = inputs.clone()
        before = copied._version
        outputs = self.adapter(module, copied)
        self._copies_inputs = copied._version != before
        return outputs
