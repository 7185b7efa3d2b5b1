"""`ModelSpec`: a module with its input and output format. A factory may return one."""

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
    Module = Any  # settings are read before torch is loaded


class ModelSpec(ModelTraits):
    """A module and its traits; unset fields come from the settings, or are detected.

    Pixels are scaled to `pixel_range`; then `mean` is subtracted, and the result divided by `std`. Without an input
    size a model only takes floating arrays, of any shape. Raises `ConfigurationError` for an invalid value.
    """

    module: Module = Field(kw_only=False)
    class_names: tuple[str, ...] | None = Field(None, description="names of the K classes, in order")
    odd_margin: OddMargin | None = Field(
        None,
        description='rounding of half an odd crop margin, at top and left: to even ("round", None), or down ("floor")',
    )
    batch: tuple[int, int] | None = Field(
        None, description="least and largest batch size of the module; smaller batches are padded"
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
        return KernelOptions(**{name: getattr(self, name) for name in KernelFields.model_fields})

    def replace(self, **traits: Any) -> Self:
        return type(self)(**self._set_fields() | traits)

    def completed(self, settings: Mapping[str, Any]) -> Self:
        """Return a copy with unset fields filled in from the settings, whose `name` takes precedence.

        Raises `ConfigurationError` if the settings and the spec have different values for a field.
        """
        own = self._set_fields()
        for name, theirs in settings.items():
            if name != "name" and name in own and own[name] != theirs:
                raise ConfigurationError(
                    f"{name}: the settings have {theirs!r}, the model's own specification has {own[name]!r}"
                )
        return self.replace(**settings)

    def _set_fields(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.model_fields_set}
        return {name: value for name, value in own.items() if value is not None}
