"""`ModelSpec`, which a factory may return: the module, and what is known about its input and its output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, get_args

from ..errors import ConfigurationError
from ..inputs.preprocessing import Interpolation, OddMargin
from .options import Activation, KernelOptions, Outputs, Precision

if TYPE_CHECKING:
    from torch import nn

Constant = bool | int | float | str


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A module and what is known about it; what is None here comes from the settings.

    Pixels are scaled to `pixel_range`, then `mean` is subtracted and `std` divides. Without an input size a model takes
    floating arrays of any shape, and neither files nor pixels.
    """

    module: "nn.Module"
    input_size: tuple[int, int, int] | None = None  # C, H, W
    trial_size: tuple[int, int, int] | None = None  # C, H, W that a model is tried with; None: the input size
    mean: Sequence[float] | None = None  # one for each channel; None: 0
    std: Sequence[float] | None = None  # one for each channel; None: 1
    pixel_range: tuple[float, float] | None = None  # what pixels 0 and 255 are scaled to, before the mean; None: 0, 1
    # The short side in pixels, or "HEIGHTxWIDTH", before the centre crop; "exact": the input's own height and width;
    # "none": not at all. None: just covers the input.
    resize: int | str | None = None
    odd_margin: OddMargin | None = None  # half of it, above and on the left: to even ("round", None), or down ("floor")
    interpolation: Interpolation | None = None  # None: bilinear
    window: tuple[float, float] | None = None  # values of 16-bit files that become black and white; None: the file's
    input: str | None = None  # the keyword that takes the images; None: found out
    arguments: Mapping[str, Constant] | None = None  # constants for other keywords
    label: str | None = None  # a keyword that demands labels, and gets zeros; None: found out
    output: int | str | None = None  # place, key or attribute in what the module returns; None: found out
    batch: tuple[int, int] | None = None  # least and most examples that the module takes at once; fewer are filled up
    outputs: Outputs | None = None  # what that is, [N, K] or [N, K, h, w]; None: found out
    activation: Activation | None = None  # whether classes exclude each other; None: found out
    labels: Sequence[str] | None = None  # the names of the K classes, in order
    layer_layout: Mapping[str, str] | None = None  # "nchw", "nhwc" or "tokens:P:HxW" by layer; others are found out
    name: str | None = None  # what requests call the model
    precision: Precision | None = None  # that the module computes in; None: its own
    fold: bool | None = None  # BatchNorm into the convolutions before it; this and the next ones None: no
    channels_last: bool | None = None
    compile: bool | None = None
    cuda_graphs: bool | None = None

    @property
    def options(self) -> KernelOptions:
        """What the kernel may do to be faster."""
        chosen = {field.name: getattr(self, field.name) for field in fields(KernelOptions)}
        return KernelOptions(**{name: each for name, each in chosen.items() if each is not None})

    def completed(self, settings: Mapping[str, Any]) -> "ModelSpec":
        """Return this with what it leaves out filled in; a name in the settings wins.

        `ConfigurationError` where settings and specification say different things of the same model.
        """
        self._check()
        filled: dict[str, Any] = {"name": settings.get("name") or self.name}
        for field in fields(self)[1:]:
            ours, theirs = getattr(self, field.name), settings.get(field.name)
            if field.name == "name" or theirs is None:
                continue
            if ours is not None and _plain(ours) != _plain(theirs):
                raise ConfigurationError(
                    f"{field.name}: the settings say {theirs!r}, the model's own specification says {ours!r}"
                )
            filled[field.name] = theirs
        return replace(self, **filled)

    def _check(self) -> None:
        """Refuse what is no value of its field: a factory is the operator's own code, and seldom checked by types."""
        from torch import nn

        if not isinstance(self.module, nn.Module):
            raise ConfigurationError(f"module: got {type(self.module).__name__}, expected a torch.nn.Module")
        if self.name is not None and not isinstance(self.name, str):
            raise ConfigurationError(f"name: got {self.name!r}, expected text")
        if self.outputs not in (None, "logits", "probabilities"):
            raise ConfigurationError(f'outputs: got {self.outputs!r}, expected "logits" or "probabilities"')
        if self.activation not in (None, "softmax", "sigmoid"):
            raise ConfigurationError(f'activation: got {self.activation!r}, expected "softmax" or "sigmoid"')
        precisions = get_args(Precision)
        if self.precision not in (None, *precisions):
            raise ConfigurationError(f"precision: got {self.precision!r}, expected one of {', '.join(precisions)}")
        if isinstance(self.labels, str) or not all(isinstance(label, str) for label in self.labels or ()):
            raise ConfigurationError("labels: expected a list of texts, one for each class")


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else value
