"""Methods: how a caller says which points are looked at and how their gradients are folded.

A class holds what was asked for; `message()` says it on the wire with every default filled in, and raises
`InvalidArgument` for what the wire cannot hold. Whether a number is within its range, the server says.
"""

from dataclasses import dataclass

from sidelight.v1 import attribution_pb2 as pb

from ._baselines import Baseline, baseline_message
from ._errors import InvalidArgument
from ._fields import counted, flag, real, text, told, whole
from ._masking import Occlusion, Rise
from ._tensor import Array, ArrayLike, TorchTensor, floats
from ._words import Rule, Statistic, rule_number, statistic_number

MAX_ROWS = 300


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient of the score at the example.

    Simonyan, Vedaldi and Zisserman, 2013, "Deep Inside Convolutional Networks". `signed` keeps the sign when channels
    are reduced, `squared` squares instead; `times_input` multiplies by the model's input (Shrikumar, Greenside and
    Kundaje, 2016, "Not Just a Black Box").
    """

    signed: bool = False
    times_input: bool = False
    squared: bool = False

    def message(self) -> pb.Method:
        """Return what goes over the wire."""
        signed, squared = flag(self.signed, "method.signed"), flag(self.squared, "method.squared")
        if signed and squared:
            raise InvalidArgument("method.squared: got True beside signed, expected one of the two at most")
        magnitude = pb.MAGNITUDE_SQUARED if squared else pb.MAGNITUDE_SIGNED if signed else pb.MAGNITUDE_ABSOLUTE
        times_input = flag(self.times_input, "method.times_input")
        return pb.Method(gradient=pb.GradientMethod(magnitude=magnitude, times_input=times_input))


@dataclass(frozen=True, slots=True, eq=False)
class IntegratedGradients:
    """The gradient integrated along the straight path from a baseline to the example, times their difference.

    Sundararajan, Taly and Yan, 2017, "Axiomatic Attribution for Deep Networks". The path has `steps` nodes by a `rule`
    (None: gauss_legendre). With a `tolerance` in (0, 1) it is refined instead, by the trapezoid rule, until that
    changes an example's map by at most this share in L2, or `max_rows` have run; `steps` is then not sent.

    `baseline`: "zero", "black", "mean_colour", "blurred", a number, `Blurred(sigma)`, or a floating array [C, H, W] or
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

    `noise` is the standard deviation as a share of the example's range, or in the input's own unit with
    `absolute_noise`. With a `tolerance` in (0, 1) an example ends once the standard error's L2 norm over the mean's is
    at most that, or `max_rows` have run; `samples` is then not sent.
    """

    samples: int = 25
    noise: float = 0.15
    seed: int = 0
    absolute_noise: bool = False
    statistic: Statistic = "mean"
    tolerance: float | None = None
    max_rows: int = MAX_ROWS
    base: Gradient | IntegratedGradients = Gradient()

    def message(self) -> pb.Method:
        """Return what goes over the wire."""
        if not isinstance(self.base, Gradient | IntegratedGradients):
            raise InvalidArgument(f"method.base: got {told(self.base)}, expected Gradient() or IntegratedGradients()")
        samples = whole(self.samples, "method.samples")
        return pb.Method(
            smoothgrad=pb.SmoothGradMethod(
                samples=samples if self.tolerance is None else 0,
                noise=real(self.noise, "method.noise"),
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
    zero alone. `noise`, a share of the example's range, is added to the example.
    """

    samples: int = 50
    baselines: Array | TorchTensor | ArrayLike | None = None
    noise: float = 0.0
    seed: int = 0

    def message(self) -> pb.Method:
        """Return what goes over the wire."""
        expected = "None or a floating array [M, C, H, W]"
        given = self.baselines
        return pb.Method(
            expected_gradients=pb.ExpectedGradientsMethod(
                samples=whole(self.samples, "method.samples"),
                baselines=None if given is None else floats(given, "method.baselines", expected=expected),
                noise=real(self.noise, "method.noise"),
                seed=whole(self.seed, "method.seed", bits=64),
            )
        )


@dataclass(frozen=True, slots=True)
class GradCam:
    """A layer's channels, weighed by their mean gradient and added; one number with its sign for each pixel.

    Selvaraju, Cogswell, Das, Vedantam, Parikh and Batra, 2017, "Grad-CAM: Visual Explanations from Deep Networks via
    Gradient-based Localization". `layer` is a name of `ModelInfo.layers`; empty is the last that all has passed.
    `keep_negative` leaves out the final ReLU.
    """

    layer: str = ""
    keep_negative: bool = False

    def message(self) -> pb.Method:
        """Return what goes over the wire."""
        keep_negative = flag(self.keep_negative, "method.keep_negative")
        layer = text(self.layer, "method.layer")
        return pb.Method(grad_cam=pb.GradCamMethod(layer=layer, keep_negative=keep_negative))


@dataclass(frozen=True, slots=True)
class LayerGradientTimesActivation:
    """A layer's gradient times its activation.

    Ancona, Ceolini, Öztireli and Gross, 2018, "Towards better understanding of gradient-based attribution methods for
    Deep Neural Networks". `layer` is a name of `ModelInfo.layers`; empty is the last that all has passed.
    """

    layer: str = ""

    def message(self) -> pb.Method:
        """Return what goes over the wire."""
        layer = text(self.layer, "method.layer")
        return pb.Method(layer_gradient_times_activation=pb.LayerGradientTimesActivationMethod(layer=layer))


@dataclass(frozen=True, slots=True)
class GuidedBackpropagation:
    """The gradient, of which every ReLU lets only the positive part pass.

    Springenberg, Dosovitskiy, Brox and Riedmiller, 2014, "Striving for Simplicity: The All Convolutional Net".
    """

    def message(self) -> pb.Method:
        """Return what goes over the wire."""
        return pb.Method(guided_backpropagation=pb.GuidedBackpropagationMethod())


Method = (
    Gradient
    | SmoothGrad
    | IntegratedGradients
    | ExpectedGradients
    | GradCam
    | LayerGradientTimesActivation
    | Occlusion
    | Rise
    | GuidedBackpropagation
)


def is_one_row(method: Method) -> bool:
    """Say whether a method runs each example once."""
    return isinstance(method, Gradient | GradCam | LayerGradientTimesActivation | GuidedBackpropagation)


def _tolerance(tolerance: float | None) -> float:
    """Return what is sent: 0 is unset, and so cannot be asked for."""
    if tolerance is None:
        return 0.0
    if number := real(tolerance, "method.tolerance"):
        return number
    raise InvalidArgument("method.tolerance: got 0, expected more than 0 and less than 1, or None")
