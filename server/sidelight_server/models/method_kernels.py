"""The kernels of a model: one for most methods, and others for methods that have a precision of their own."""

from collections.abc import Callable, Iterator, Mapping

from ..compute.kernel import Kernel
from ..config.options import KernelOptions, Precision
from ..errors import ConfigurationError, did_you_mean
from ..methods import METHODS


class MethodKernels:
    """Returns a model's kernel for a method. Methods of one precision share a kernel."""

    def __init__(
        self,
        make: Callable[[KernelOptions], Kernel],
        options: KernelOptions,
        precisions: Mapping[str, Precision] | None = None,
    ) -> None:
        """Make the kernels. Raises `ConfigurationError` if `precisions` names no method, or the weights are double."""
        names = [method.name for method in METHODS]
        self.default = make(options)
        self._made = {options.precision: self.default}
        self._by_method: dict[str, Kernel] = {}
        for method, precision in (precisions or {}).items():
            if method not in names:
                raise ConfigurationError(f'method_precision: no method "{method}"; {did_you_mean(method, names)}')
            if precision not in self._made:
                self._made[precision] = make(options.model_copy(update={"precision": precision}))
            self._by_method[method] = self._made[precision]
        if len({kernel.dtype for kernel in self}) > 1:
            raise ConfigurationError("method_precision: needs a model of float32 weights; set precision as well")

    def __iter__(self) -> Iterator[Kernel]:
        return iter(self._made.values())

    def of(self, method: str) -> Kernel:
        """Return the kernel that runs a method."""
        return self._by_method.get(method, self.default)
