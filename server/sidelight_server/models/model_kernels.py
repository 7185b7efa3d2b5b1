"""The kernels of a model: one for each precision that its methods run in."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from ..compute.kernel import Kernel
from ..config.options import KernelOptions, Precision
from ..domain import PREDICTED, Score
from ..errors import ConfigurationError, did_you_mean
from ..methods import METHODS
from ..telemetry.logs import Event
from .trial.in_turn import InTurn
from .trial.trial_run import model_errors

log = logging.getLogger("sidelight")


class ModelKernels:
    """A model's kernels: a default one, and one for each other precision that the operator has set for a method."""

    def __init__(
        self, make: Callable[..., Kernel], options: KernelOptions, precisions: Mapping[str, Precision] | None = None
    ) -> None:
        """Make the kernels. Raises `ConfigurationError` if `precisions` names no method, or the weights are double."""
        names = [method.name for method in METHODS]
        self._options = options
        self.default = make(options=options)
        self._made = {options.precision: self.default}
        self._by_method: dict[str, Kernel] = {}
        for method, precision in (precisions or {}).items():
            if method not in names:
                raise ConfigurationError(f'method_precision: no method "{method}"; {did_you_mean(method, names)}')
            if precision not in self._made:
                self._made[precision] = make(options=options.model_copy(update={"precision": precision}))
            self._by_method[method] = self._made[precision]
        if len({kernel.dtype for kernel in self}) > 1:
            raise ConfigurationError("method_precision: needs a model of float32 weights; set precision as well")

    def __iter__(self) -> Iterator[Kernel]:
        return iter(self._made.values())

    def log_fold(self, model: str) -> None:
        """Log whether BatchNorms were fused, if the option `fold` is set."""
        if self.default.options.fold:
            log.info(Event("folded", model=model, norms=self.default.n_folded))
        elif self._options.fold:
            message = "no BatchNorm directly follows a convolution or a linear layer; leave fold unset"
            log.warning(Event("not_folded", model=model, message=message))

    def run_first(
        self, model: str, inputs: Tensor, score: Score, *, gradient: bool, in_turn: InTurn
    ) -> tuple[int, ...]:
        """Run each kernel on an input, [1, C, H, W], and return the shape of the outputs: K, or K, h, w.

        Raises `ConfigurationError` if one fails, or has a precision that has no effect.
        """
        failed = "failed" if self.default.options.is_exact else f"failed as {self.default.summary}"
        for kernel in self:
            with model_errors(model, f"{failed} on an input of {list(inputs.shape)}"):
                answer = in_turn(functools.partial(kernel.run, inputs, [PREDICTED], [score], gradient=gradient))
            if kernel.precision == "mixed" and gradient and not kernel.has_mixed:
                raise ConfigurationError(
                    f'precision: mixed has no effect on model "{model}": its code calls no dense convolution or '
                    "linear layer from Python; leave precision unset"
                )
        return answer.output_shape

    def of(self, method: str) -> Kernel:
        return self._by_method.get(method, self.default)
