"""Methods that average gradients over several points: on a path from a baseline, or around the example."""

from dataclasses import dataclass

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.enums import Rule, Statistic, enum_number
from .._inputs.tensors import Array, ArrayLike, TorchTensor, floats
from .._inputs.validation import counted, flag, real, summary, whole
from ..exceptions import InvalidArgument
from .baselines import Baseline, baseline_message
from .gradient import GRADIENT, Gradient
from .method import Method

MAX_ROWS = 300


@dataclass(frozen=True, slots=True, eq=False)
class IntegratedGradients(Method):
    """The gradient integrated along the straight path from a baseline to the example, times their difference.

    Sundararajan, Taly and Yan, 2017, "Axiomatic Attribution for Deep Networks". `steps` is the number of points, `rule`
    the quadrature rule (None: gauss_legendre). With a `tolerance` in (0, 1), `steps` is ignored: the trapezoid rule is
    refined until a refinement changes an example's map by at most this share of its L2 norm and the completeness error
    is at most this share of its L1 norm, or until `max_rows` have run.

    `baseline`: "zero", "black", "mean_color", "blurred", a number, `Blurred(sigma)`, or a floating array [C, H, W] or
    [N, C, H, W] in the model's input space.
    """

    steps: int = 50
    rule: Rule | None = None
    baseline: Baseline = "zero"
    tolerance: float | None = None
    max_rows: int = MAX_ROWS

    def message(self) -> pb.Method:
        steps = whole(self.steps, "method.steps")
        by_default: Rule = "gauss_legendre" if self.tolerance is None else "trapezoid"
        return pb.Method(
            integrated_gradients=pb.IntegratedGradientsMethod(
                steps=steps if self.tolerance is None else 0,
                rule=enum_number(pb.PathRule, by_default if self.rule is None else self.rule, Rule, "method.rule"),
                baseline=baseline_message(self.baseline),
                tolerance=_tolerance(self.tolerance),
                max_rows=counted(self.max_rows, "method.max_rows"),
            )
        )


@dataclass(frozen=True, slots=True, eq=False)
class SmoothGrad(Method):
    """The mean, mean square or variance of a base method over `samples` copies of the example with Gaussian noise.

    Smilkov, Thorat, Kim, Viégas and Wattenberg, 2017, "SmoothGrad: removing noise by adding noise" ("mean"); Hooker,
    Erhan, Kindermans and Kim, 2019, "A Benchmark for Interpretability Methods in Deep Neural Networks" ("mean_square");
    Adebayo, Gilmer, Goodfellow and Kim, 2018, "Local Explanation Methods for Deep Neural Networks Lack Sensitivity to
    Parameter Values" ("variance").

    `noise_level` is the noise's standard deviation as a share of the example's range, or in units of the model's input
    with `absolute_noise`. With a `tolerance` in (0, 1), `samples` is ignored: sampling stops when the L2 norm of the
    standard error is at most this share of that of the mean, or after `max_rows`.
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
                statistic=enum_number(pb.SmoothGradMethod.Statistic, self.statistic, Statistic, "method.statistic"),
                tolerance=_tolerance(self.tolerance),
                max_rows=counted(self.max_rows, "method.max_rows"),
                base=self.base.message(),
            )
        )


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedGradients(Method):
    """The gradient times (example − baseline), averaged over random baselines and points on the path (GradientSHAP).

    Erion, Janizek, Sturmfels, Lundberg and Lee, 2021, "Improving performance of deep learning models with axiomatic
    attribution priors and expected gradients". `baselines` is a floating array [M, C, H, W] to draw from; None is zero.
    `noise_level` is the standard deviation of Gaussian noise on the example, as a share of its range.
    """

    samples: int = 50
    baselines: Array | TorchTensor | ArrayLike | None = None
    noise_level: float = 0.0
    seed: int = 0

    def message(self) -> pb.Method:
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
    """Return the value to send: 0 if unset, and therefore not a valid tolerance."""
    if tolerance is None:
        return 0.0
    if share := real(tolerance, "method.tolerance"):
        return share
    raise InvalidArgument("method.tolerance: got 0, expected more than 0 and less than 1, or None")
