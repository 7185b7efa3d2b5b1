"""The adapter: calls a module and extracts the outputs from what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...config.traits import Constant
from ...errors import OutputsError

LabelForm = Literal["classes", "column", "row"]  # int64 [n], or floating [n, 1] or [n, K]


@dataclass(frozen=True, slots=True)
class LabelFiller:
    """Zeros for a required keyword that takes labels, on which the outputs do not depend."""

    keyword: str
    form: LabelForm = "classes"
    width: int = 1  # K of a row

    def fill(self, like: Tensor, value: int = 0) -> Tensor:
        """Return labels of the right form for inputs, [n, C, H, W], filled with `value`."""
        if self.form == "classes":
            return torch.full((len(like),), value, dtype=torch.int64, device=like.device)
        return torch.full((len(like), self.width), value, dtype=like.dtype, device=like.device)


@dataclass(frozen=True, slots=True)
class Adapter:
    """How to call one module. By default with one positional tensor, returning one tensor."""

    input: str = ""  # the keyword for the images; empty: the first positional argument
    arguments: tuple[tuple[str, Constant], ...] = ()
    labels: LabelFiller | None = None
    output: int | str | None = None  # index, key or attribute in the return value; None: the whole value
    least: int = 1  # least batch size of the module; smaller batches are padded
    most: int = 0  # largest batch size of the module; 0: no limit

    def __call__(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Return the module's outputs for inputs, [n, C, H, W]: [n, K] or [n, K, h, w].

        Raises whatever the module raises, and `OutputsError` if it returns anything else.
        """
        return self.outputs(self.call(module, inputs), n=len(inputs))

    def outputs(self, returned: object, *, n: int) -> Tensor:
        """Return the outputs of n inputs from the return value of `call`."""
        outputs = returned if self.output is None else _find_item(returned, self.output)
        if not isinstance(outputs, Tensor):
            is_unset = self.output is None and items(returned)
            hint = "; set output_key, or trial_size to have it detected" if is_unset else ""
            raise OutputsError(
                f"the model returned {summary(returned)}, expected a tensor [n, K] or [n, K, h, w]{hint}"
            )
        if outputs.is_complex():
            raise OutputsError(f"the model returned {outputs.dtype}, expected real numbers".replace("torch.", ""))
        outputs = outputs[:n] if n < self.least else outputs
        outputs = outputs[:, None] if outputs.ndim == 1 else outputs
        if outputs.ndim not in (2, 4) or len(outputs) != n or 0 in outputs.shape:
            raise OutputsError(
                f"the model returned {summary(returned)} for {n} examples, expected [n, K] or [n, K, h, w]"
            )
        return outputs

    def call(self, module: nn.Module, inputs: Tensor, *, label: int = 0) -> object:
        """Return the module's whole return value, including padded rows."""
        if missing := max(0, self.least - len(inputs)):
            inputs = torch.cat([inputs, inputs.new_zeros(missing, *inputs.shape[1:])])
        named: dict[str, object] = dict(self.arguments)
        if self.labels:
            named[self.labels.keyword] = self.labels.fill(inputs, label)
        return module(**{self.input: inputs}, **named) if self.input else module(inputs, **named)

    @property
    def summary(self) -> str:
        """The call as text: "(image=images, disease=zeros) → y_prob"."""
        taken = [f"{self.input}=images" if self.input else "images"]
        taken += [f"{name}={value}" for name, value in self.arguments]
        taken += [f"{self.labels.keyword}=zeros"] if self.labels else []
        return f"({', '.join(taken)})" + ("" if self.output is None else f" → {self.output}")


PLAIN = Adapter()


def items(returned: object) -> Mapping[int | str, object]:
    """Return the items of a module's return value by key, index or, for other objects, attribute."""
    if isinstance(returned, Mapping):
        return returned
    if isinstance(returned, list | tuple):
        return dict(enumerate(returned)) | {name: getattr(returned, name) for name in getattr(returned, "_fields", ())}
    return {} if isinstance(returned, Tensor) or returned is None else getattr(returned, "__dict__", {})


def summary(returned: object) -> str:
    """Describe a module's return value: "dict of loss [], y_prob [2, 5]"."""
    name = type(returned).__name__
    if isinstance(returned, Tensor):
        kind = str(returned.dtype).removeprefix("torch.")
        return f"{list(returned.shape)}" if returned.is_floating_point() else f"{kind} {list(returned.shape)}"
    within = [
        f"{key} {list(each.shape) if isinstance(each, Tensor) else type(each).__name__}"
        for key, each in items(returned).items()
    ]
    return f"{name} of {', '.join(within[:8])}" if within else name


def _find_item(returned: object, output: int | str) -> object:
    try:
        return items(returned)[output]
    except KeyError:
        raise OutputsError(f'the model returned {summary(returned)}, which has no "{output}"') from None
