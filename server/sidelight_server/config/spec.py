"""`ModelSpec`, which a factory may return: the module, and what is known about its input and its output."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, ValidationError

from ..errors import ConfigurationError
from ..inputs.preprocessing import OddMargin
from .faults import first_fault
from .options import KernelFields, KernelOptions
from .traits import ModelTraits

if TYPE_CHECKING:
    from torch import nn

    Module = nn.Module
else:
    Module = Any  # the settings are made before torch is loaded


class ModelSpec(ModelTraits):
    """A module and what is known about it; what is unset comes from the settings.

    Pixels are scaled to `pixel_range`, then `mean` is subtracted and `std` divides. Without an input size a model takes
    floating arrays of any shape, and neither files nor pixels. `ConfigurationError` for a value that is none.
    """

    module: Module = Field(kw_only=False)
    class_names: tuple[str, ...] | None = Field(None, description="of the K classes, in order")
    odd_margin: OddMargin | None = Field(
        None, description='half of it, above and on the left: to even ("round", None), or down ("floor")'
    )
    batch: tuple[int, int] | None = Field(
        None, description="least and most examples that the module takes at once; fewer are filled up"
    )

    if not TYPE_CHECKING:

        def __init__(self, module: Module, **traits: Any) -> None:
            from torch import nn

            if not isinstance(module, nn.Module):
                raise ConfigurationError(f"module: got {type(module).__name__}, expected a torch.nn.Module")
            try:
                super().__init__(module=module, **traits)
            except ValidationError as error:
                raise ConfigurationError(first_fault(error, known=ModelSpec.model_fields, where="ModelSpec")) from None

    @property
    def options(self) -> KernelOptions:
        """What the kernel may do to be faster."""
        return KernelOptions(**{name: getattr(self, name) for name in KernelFields.model_fields})

    def replace(self, **traits: Any) -> Self:
        """Return a specification with some traits changed."""
        return type(self)(**self._said() | traits)

    def completed(self, settings: Mapping[str, Any]) -> Self:
        """Return this with what it leaves out filled in; a name in the settings wins.

        `ConfigurationError` where settings and specification say different things of the same model.
        """
        said = self._said()
        for name, theirs in settings.items():
            if name != "name" and name in said and said[name] != theirs:
                raise ConfigurationError(
                    f"{name}: the settings say {theirs!r}, the model's own specification says {said[name]!r}"
                )
        return self.replace(**settings)

    def _said(self) -> dict[str, Any]:
        said = {name: getattr(self, name) for name in self.model_fields_set}
        return {name: value for name, value in said.items() if value is not None}
