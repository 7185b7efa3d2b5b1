"""Methods that average gradients over several points: along a path, or around the example."""

from dataclasses import dataclass

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.enums import Rule, Statistic, rule_number, statistic_number
from .._inputs.tensors import Array, ArrayLike, TorchTensor, floats
from .._inputs.validation import counted, flag, real, summary, whole
from ..exceptions import InvalidArgument
from .baselines import Baseline, baseline_message
from .gradient import GRADIENT, Gradient

MAX_ROWS = 300


@dataclass(frozen=True, slots=True, eq=False)
class IntegratedGradients:
    """The gradient integrated along the straight path from a baseline to the example, times their difference.

    Sundararajan, Taly and Yan, 2017, "Axiomatic Attribution for Deep Networks". The path has `steps` nodes by a `rule`
    (None: gauss_legendre). With a `tolerance` in (0, 1) it is refined instead, by the trapezoid rule, until that
    changes an example's map by at most this share in L2, or `max_rows` have run; `steps` is then not sent.

    `baseline`: "zero", "black", "mean_color", "blurred", a number, `Blurred(sigma)`, or a floating array [C, H, W] or
    [N, C, H, W] in the model's own input space.
    """

    steps: int = 50
    rule: Rule | None = None
    baseline: Baseline = "zero"
    tolerance: float | None = None
    max_rows: int = MAX_ROWS

    def message(self) -> pb.Method:
        """Return what goes over the wire."""
        steps = whole(self.steps, "method.steps")
        by_default: Rule = "gauss_legendre" if self.tolerance is None else "trapezoid"
        return pb.Method(
            integrated_gradients=pb.IntegratedGradientsMethod(
                steps=steps if self.tolerance is None else 0,
                rule=rule_number(by_default if self.rule is None else self.rule),
                baseline=baseline_message(self.baseline),
                tolerance=_tolerance(self.tolerance),
                max_rows=counted(self.max_rows, "method.max_rows"),
            )
        )


@dataclass(frozen=True, slots=True, eq=False)
class SmoothGrad:
    """A base method folded over `samples` copies of the example with Gaussian noise.

    Smilkov, Thorat, Kim, Viégas and Wattenberg, 2017, "SmoothGrad: removing noise by adding noise" ("mean"); Hooker,
    Erhan, Kindermans and Kim, 2019, "A Benchmark for Interpretability Methods in Deep Neural Networks" ("mean_square");
    Adebayo, Gilmer, Goodfellow and Kim, 2018, "Local Explanation Methods for Deep Neural Networks Lack Sensitivity to
    Parameter Values" ("variance").

    `noise_level` is the standard deviation as a share of the example's range, or in the input's own unit with
    `absolute_noise`. With a `tolerance` in (0, 1) an example ends once the standard error's L2 norm over the mean's is
    at most that, or `max_rows` have run; `samples` is then not sent.
    """

    samples: int = 25
    noise_level: float = 0.15
    seed: int = 0
    absolute_noise: bool = False
    statistic: Statistic = "mean"
    tolerance: float | None = None
    max_rows: int = MAX_ROWS
    base: Gradient | IntegratedGradients = GRADIENT

    def message(self) -> pb.Method:
        """Return what goes over the wire."""
        if not isinstance(self.base, Gradient | IntegratedGradients):
            raise InvalidArgument(
                f"method.base: got {summary(self.base)}, expected Gradient() or IntegratedGradients()"
            )
        samples = whole(self.samples, "method.samples")
        return pb.Method(
            smoothgrad=pb.SmoothGradMethod(
                samples=samples if self.tolerance is None else 0,
                noise_level=real(self.noise_level, "method.noise_level"),
                absolute_noise=flag(self.absolute_noise, "method.absolute_noise"),
                seed=whole(self.seed, "method.seed", bits=64),
                statistic=statistic_number(self.statistic),
                tolerance=_tolerance(self.tolerance),
                max_rows=counted(self.max_rows, "method.max_rows"),
                base=self.base.message(),
            )
        )


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedGradients:
    """Gradient times difference, averaged over random baselines and random points of the path (GradientSHAP).

    Erion, Janizek, Sturmfels, Lundberg and Lee, 2021, "Improving performance of deep learning models with axiomatic
    attribution priors and expected gradients". `baselines` is a floating array [M, C, H, W] that is drawn from; None is
    zero alone. `noise_level`, a share of the example's range, is added to the example.
    """

    samples: int = 50
    baselines: Array | TorchTensor | ArrayLike | None = None
    noise_level: float = 0.0
    seed: int = 0

    def message(self) -> pb.Method:
        """Return what goes over the wire."""
        expected = "None or a floating array [M, C, H, W]"
        given = self.baselines
        return pb.Method(
            expected_gradients=pb.ExpectedGradientsMethod(
                samples=whole(self.samples, "method.samples"),
                baselines=None if given is None else floats(given, "method.baselines", expected=expected),
                noise_level=real(self.noise_level, "method.noise_level"),
                seed=whole(self.seed, "method.seed", bits=64),
            )
        )


def _tolerance(tolerance: float | None) -> float:
    """Return what is sent: 0 is unset, and so cannot be asked for."""
    if tolerance is None:
        return 0.0
    if number := real(tolerance, "method.tolerance"):
        return number
    raise InvalidArgument("method.tolerance: got 0, expected more than 0 and less than 1, or None")
