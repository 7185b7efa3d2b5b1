"""Bad parameters are refused, naming the field, what came and what was expected; unknown layers with the near names."""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from sidelight_server import (
    RISE,
    Engine,
    ExpectedGradients,
    GradCAM,
    Gradient,
    GuidedBackpropagation,
    IntegratedGradients,
    LayerGradientXActivation,
    ModelSpec,
    Occlusion,
    Rule,
    Settings,
    SmoothGrad,
)
from sidelight_server.errors import FailedPrecondition, InvalidArgument, NotFound
from sidelight_server.methods import METHODS, Method
from torch import Tensor, nn

from support.engines import ask, explaining
from support.models import small_cnn

SHAPE = (2, 12, 12)
LIMIT = 100  # rows of one example
NAN, INFINITE = float("nan"), float("inf")


def refined(tolerance: float, *, steps: int = 0, rule: Rule = Rule.TRAPEZOID, max_rows: int = 300) -> Method:
    return IntegratedGradients(steps, rule, tolerance=tolerance, max_rows=max_rows)


BAD: dict[str, tuple[Callable[[], Method], str]] = {
    "ig, no steps": (lambda: IntegratedGradients(0), "integrated_gradients.steps: got 0, expected at least 1"),
    "ig, fewer": (lambda: IntegratedGradients(-5), "integrated_gradients.steps: got -5, expected at least 1"),
    "ig, a trapezoid of one": (
        lambda: IntegratedGradients(1, Rule.TRAPEZOID),
        "integrated_gradients.steps: got 1, expected at least 2",
    ),
    "ig, steps and tolerance": (
        lambda: refined(0.1, steps=50),
        "integrated_gradients: got steps 50 and tolerance 0.1, expected one of them",
    ),
    "ig, a rule that cannot be refined": (
        lambda: refined(0.1, rule=Rule.MIDPOINT),
        "integrated_gradients.rule: got midpoint with a tolerance, expected trapezoid, which alone can be refined",
    ),
    "ig, too few rows": (lambda: refined(0.1, max_rows=2), "integrated_gradients.max_rows: got 2, expected at least 3"),
    "smoothgrad, no samples": (lambda: SmoothGrad(0), "smoothgrad.samples: got 0, expected at least 1"),
    "smoothgrad, negative noise": (
        lambda: SmoothGrad(noise_level=-0.1),
        "smoothgrad.noise_level: got -0.1, expected at least 0",
    ),
    "smoothgrad, endless noise": (
        lambda: SmoothGrad(noise_level=INFINITE),
        "smoothgrad.noise_level: got inf, expected at least 0",
    ),
    "smoothgrad, noise of nothing": (
        lambda: SmoothGrad(noise_level=NAN),
        "smoothgrad.noise_level: got nan, expected at least 0",
    ),
    "smoothgrad, samples and tolerance": (
        lambda: SmoothGrad(25, tolerance=0.1),
        "smoothgrad: got samples 25 and tolerance 0.1, expected one of them",
    ),
    "smoothgrad, no rows": (
        lambda: SmoothGrad(0, tolerance=0.1, max_rows=0),
        "smoothgrad.max_rows: got 0, expected at least 1",
    ),
    "expected gradients, no samples": (
        lambda: ExpectedGradients(0),
        "expected_gradients.samples: got 0, expected at least 1",
    ),
    "expected gradients, negative noise": (
        lambda: ExpectedGradients(noise_level=-1.0),
        "expected_gradients.noise_level: got -1, expected at least 0",
    ),
    "expected gradients, baselines with NaN": (
        lambda: ExpectedGradients(baselines=np.full((1, *SHAPE), NAN)),
        "expected_gradients.baselines: it has NaN or infinite elements, expected finite ones",
    ),
    "occlusion, no height": (lambda: Occlusion((0, 4)), "occlusion.window_height: got 0, expected at least 1"),
    "occlusion, no width": (lambda: Occlusion((4, 0)), "occlusion.window_width: got 0, expected at least 1"),
    "occlusion, no stride": (
        lambda: Occlusion((4, 4), (0, 1)),
        "occlusion.stride_height: got 0, expected at least 1",
    ),
    "occlusion, gaps": (
        lambda: Occlusion((4, 4), (4, 5)),
        "occlusion.stride_width: got 5, expected at most window_width, 4: pixels between the windows would have no "
        "value",
    ),
    "rise, no masks": (lambda: RISE(masks=0), "rise.masks: got 0, expected at least 1"),
    "rise, no cells": (lambda: RISE(cells=0), "rise.cells: got 0, expected at least 1"),
    "rise, nothing kept": (
        lambda: RISE(keep_probability=0.0),
        "rise.keep_probability: got 0, expected a number in (0, 1)",
    ),
    "rise, all kept": (lambda: RISE(keep_probability=1.0), "rise.keep_probability: got 1, expected a number in (0, 1)"),
}

UNFIT = {
    "occlusion, higher than the image": (
        Occlusion((13, 4)),
        "occlusion.window_height: got 13, expected at most 12",
    ),
    "occlusion, wider than the image": (Occlusion((4, 13)), "occlusion.window_width: got 13, expected at most 12"),
    "rise, cells smaller than a pixel": (RISE(masks=30, cells=13), "rise.cells: got 13, expected at most 12"),
    "expected gradients, another shape": (
        ExpectedGradients(baselines=np.zeros((3, 2, 12, 11))),
        "expected_gradients.baselines: shape [3, 2, 12, 11], expected [M, 2, 12, 12] with M at least 1",
    ),
    "expected gradients, one without M": (
        ExpectedGradients(baselines=np.zeros(SHAPE)),
        "expected_gradients.baselines: shape [2, 12, 12], expected [M, 2, 12, 12] with M at least 1",
    ),
    "expected gradients, none": (
        ExpectedGradients(baselines=np.zeros((0, *SHAPE))),
        "expected_gradients.baselines: shape [0, 2, 12, 12], expected [M, 2, 12, 12] with M at least 1",
    ),
    "smoothgrad, no room for a draw": (
        SmoothGrad(0, tolerance=0.1, max_rows=7, base=IntegratedGradients(5)),
        "smoothgrad.max_rows: got 7, expected at least 8",
    ),
}

TOO_LONG = {
    "integrated gradients": (IntegratedGradients(99), 101),
    "a trapezoid": (IntegratedGradients(101, Rule.TRAPEZOID), 101),
    "to a tolerance": (refined(0.1, max_rows=101), 101),
    "smoothgrad": (SmoothGrad(100), 101),
    "smoothgrad of a path": (SmoothGrad(10, base=IntegratedGradients(8)), 101),
    "smoothgrad to a tolerance": (SmoothGrad(0, tolerance=0.1, max_rows=101), 101),
    "expected gradients": (ExpectedGradients(100), 101),
    "occlusion": (Occlusion((3, 3), (1, 1)), 101),
    "rise": (RISE(masks=100), 101),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    spec = ModelSpec(small_cnn(2, size=12), input_size=SHAPE)
    with Engine([spec], Settings(device="cpu", max_example_rows=LIMIT)) as engine:
        yield engine


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_parameter_is_refused_when_it_is_set(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(InvalidArgument) as refused:
        make()
    assert refused.value.message == f"method.{message}"


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 1.5, -0.1, NAN, INFINITE], ids=str)
@pytest.mark.parametrize("name", ["integrated_gradients", "smoothgrad"])
def test_a_tolerance_is_a_number_between_0_and_1(name: str, tolerance: float) -> None:
    with pytest.raises(InvalidArgument) as refused:
        refined(tolerance) if name == "integrated_gradients" else SmoothGrad(0, tolerance=tolerance)
    assert refused.value.message == f"method.{name}.tolerance: got {tolerance:g}, expected a number in (0, 1)"


@pytest.mark.parametrize("case", UNFIT)
def test_a_parameter_that_does_not_fit_the_input_is_refused(case: str, engine: Engine, x: Tensor) -> None:
    method, message = UNFIT[case]
    with pytest.raises(InvalidArgument) as refused:
        ask(engine, x, method=method)
    assert refused.value.message == f"method.{message}"


@pytest.mark.parametrize("case", TOO_LONG)
def test_a_method_of_too_many_rows_is_refused(case: str, engine: Engine, x: Tensor) -> None:
    method, rows = TOO_LONG[case]
    with pytest.raises(InvalidArgument) as refused:
        ask(engine, x, method=method)
    assert refused.value.message == (
        f"method.{method.name}: it takes {rows} rows for one example, the server's max_example_rows is {LIMIT}"
    )


@pytest.mark.parametrize("kind", [GradCAM, LayerGradientXActivation], ids=lambda kind: kind.name)
@pytest.mark.parametrize("sized", [True, False], ids=["fixed size", "any size"])
def test_an_unknown_layer_is_not_found_and_similar_names_are_suggested(
    kind: type[GradCAM], sized: bool, x: Tensor
) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.head = nn.Conv2d(2, 4, 3), nn.Linear(400, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.features(x).flatten(1))

    with explaining(Named(), input_size=SHAPE if sized else None) as explain, pytest.raises(NotFound) as refused:
        explain(x, kind("feature"))
    assert refused.value.message == 'method.layer: there is no "feature"; did you mean "features"?'


class Twice(nn.Module):
    """A rectifier that runs twice, a layer that never does, and one that returns no picture."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
        self.rectifier, self.unused, self.head = nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rectifier(self.second(self.rectifier(self.first(x))))
        return self.head(x.flatten(1))


REFUSED_LAYERS = {
    "rectifier": "runs 2 times in a pass, expected once",
    "unused": "does not run in a pass by itself",
    "head": "returns [2, 3], expected [n, c, h, w], [n, h, w, c] or tokens [n, T, c]",
}


@pytest.mark.parametrize(("layer", "why"), REFUSED_LAYERS.items(), ids=REFUSED_LAYERS)
def test_a_layer_that_does_not_return_one_picture_is_refused(layer: str, why: str, x: Tensor) -> None:
    with Engine([ModelSpec(Twice(), input_size=SHAPE)], Settings(device="cpu")) as engine:
        with pytest.raises(InvalidArgument) as refused:
            ask(engine, x, method=GradCAM(layer))
        assert refused.value.message == f'method.layer: "{layer}" {why}; name one of "first", "second"'
        assert ask(engine, x, method=GradCAM()).request.method.layer == "second"  # the default is one that can be read


@pytest.mark.parametrize(
    ("layer", "why"),
    [(layer, REFUSED_LAYERS[layer]) for layer in ("rectifier", "head")],
    ids=["rectifier", "head"],
)
def test_where_any_size_is_taken_such_a_layer_fails_the_examples(layer: str, why: str, x: Tensor) -> None:
    with Engine([ModelSpec(Twice())], Settings(device="cpu")) as engine:
        failures = ask(engine, x, method=GradCAM(layer)).failures
        assert [each.code for each in failures] == [InvalidArgument.code] * 2
        assert f'method.layer: "{layer}" {why}' in failures[0].message
        assert not ask(engine, x, method=GradCAM("second")).failures  # no hook was left behind


def test_without_a_layer_of_spatial_extent_there_is_no_default(x: Tensor) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(288, 3))
    with (
        explaining(module, input_size=SHAPE) as explain,
        pytest.raises(NotFound, match="got none, and the model has no default layer"),
    ):
        explain(x, GradCAM())


class Squashed(nn.Module):
    """Flattened pixels, squashed: nothing to guide, and no shape that could be tried unasked."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(288, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


@pytest.mark.parametrize(
    "method", [GuidedBackpropagation(), SmoothGrad(4, base=GuidedBackpropagation())], ids=["plain", "noise"]
)
def test_a_model_without_rectifiers_cannot_be_guided(method: Method, x: Tensor) -> None:
    with Engine([ModelSpec(Squashed(), input_size=SHAPE)], Settings(device="cpu")) as engine:
        with pytest.raises(FailedPrecondition, match=r"no rectifier to guide.*use gradient"):
            ask(engine, x, method=method)
        assert set(engine.model("").methods) == {each.name for each in METHODS} - {"guided_backpropagation"}
        assert not ask(engine, x, method=Gradient()).failures


def test_rectifiers_of_a_model_that_was_not_tried_are_missed_by_its_rows(x: Tensor) -> None:
    with Engine([ModelSpec(Squashed())], Settings(device="cpu")) as engine:
        failures = ask(engine, x, method=GuidedBackpropagation()).failures
        assert [each.code for each in failures] == [FailedPrecondition.code] * 2
        assert "no rectifier to guide" in failures[0].message
        assert not ask(engine, x, method=Gradient()).failures


def test_rectifiers_of_a_script_cannot_be_guided(x: Tensor) -> None:
    with warnings.catch_warnings(action="ignore"):
        script = torch.jit.trace(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(288, 3)), x[:1])
    with (
        Engine([ModelSpec(script, input_size=SHAPE)], Settings(device="cpu")) as engine,
        pytest.raises(FailedPrecondition, match="those in TorchScript and exported programs cannot be changed"),
    ):
        ask(engine, x, method=GuidedBackpropagation())
