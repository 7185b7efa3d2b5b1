"""Kernel options: maps stay within the stated tolerances, and each answer names the kernel."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sidelight_server import (
    Channels,
    Engine,
    GradCAM,
    GuidedBackpropagation,
    IntegratedGradients,
    ModelSpec,
    Settings,
)
from sidelight_server.compute.kernel import Kernel
from sidelight_server.config.options import KernelOptions
from sidelight_server.domain import PREDICTED, Score
from sidelight_server.errors import ConfigurationError
from torch import nn

from support.engines import ask
from support.models import small_cnn
from support.models.kernels import CPU, OPTIONS, SHARES, inputs, kernel, run, settings

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("score", [Score.PROBABILITY, Score.LOGIT], ids=str)
def test_maps_are_near_those_of_the_exact_kernel(name: str, score: Score) -> None:
    exact = run(Kernel(small_cnn(), device=CPU), inputs(), score)
    near = run(kernel(small_cnn(), OPTIONS[name]), inputs(), score)
    assert (near - exact).norm() <= SHARES[name] * exact.norm()
    for a, b in zip(near, exact, strict=True):
        assert spearmanr(a.abs().amax(0).flatten(), b.abs().amax(0).flatten()).statistic > 0.97
    assert not torch.equal(near, exact) or name == "channels_last"  # the option has an effect


def test_without_an_option_nothing_is_copied() -> None:
    module = small_cnn()
    exact = Kernel(module, device=CPU)
    pointers = {each.data_ptr() for each in module.parameters()}
    assert {each.data_ptr() for each in exact._replica.plain.parameters()} == pointers


@pytest.mark.parametrize("name", OPTIONS)
def test_a_kernel_does_not_change_the_callers_module(name: str) -> None:
    module = small_cnn().train()
    before = copy.deepcopy(module.state_dict())
    run(kernel(module, OPTIONS[name]), inputs())
    assert module.training
    assert all(each.requires_grad for each in module.parameters())
    assert isinstance(module[1], nn.BatchNorm2d)
    assert all(torch.equal(each, before[key]) for key, each in module.state_dict().items())


@pytest.mark.parametrize("name", OPTIONS)
def test_what_the_caller_trains_shows_in_the_next_map(name: str) -> None:
    module = small_cnn()
    before = kernel(module, OPTIONS[name])
    first = run(before, inputs())
    with torch.no_grad():
        module[0].weight.mul_(-1.5)
        module[1].running_mean.add_(0.5)
    again = run(before, inputs())
    assert not torch.equal(first, again)
    assert torch.equal(again, run(kernel(module, OPTIONS[name]), inputs()))


# Mixed precision.


def test_mixed_precision_leaves_outputs_as_they_are() -> None:
    x = inputs()
    exact = Kernel(small_cnn(), device=CPU).outputs_of(x)
    assert torch.equal(kernel(small_cnn(), OPTIONS["mixed"]).outputs_of(x.requires_grad_()), exact)


def test_the_gradient_of_a_linear_layer_is_its_weights_rounded_to_bfloat16() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    gradients = kernel(module, OPTIONS["mixed"]).run(inputs(), [PREDICTED] * 6, [Score.LOGIT] * 6).gradients
    predicted = module(inputs()).argmax(dim=1)
    assert torch.equal(gradients.flatten(1), module[1].weight[predicted].bfloat16().float())


def test_grouped_convolutions_stay_in_float32() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding="same"), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    exact = run(Kernel(module, device=CPU), inputs(), Score.LOGIT)
    assert torch.equal(run(kernel(module, OPTIONS["mixed"]), inputs(), Score.LOGIT), exact)


@pytest.mark.filterwarnings("ignore")  # of tracing
def test_mixed_precision_that_has_no_effect_is_refused() -> None:
    scripted = torch.jit.trace(small_cnn().eval(), inputs(2))
    with pytest.raises(ConfigurationError, match="precision: mixed has no effect on model"):
        Engine([ModelSpec(module=scripted, input_size=(3, 32, 32), precision="mixed")])
    with pytest.raises(ConfigurationError, match="precision: mixed has no effect on a compiled model"):
        Engine([ModelSpec(module=small_cnn(), input_size=(3, 32, 32), precision="mixed", compile=True)])


@pytest.mark.parametrize("name", OPTIONS)
def test_every_kind_of_method_runs_under_every_option(name: str) -> None:
    spec = ModelSpec(small_cnn(), input_size=(3, 32, 32))
    x = inputs(2)
    with Engine([spec], Settings(device="cpu", threads=1)) as exact, Engine([spec], settings(name)) as fast:
        for method in (IntegratedGradients(steps=8), GradCAM(layer="4"), GuidedBackpropagation()):
            a, b = (ask(each, x, method=method) for each in (exact, fast))
            assert not b.failures
            assert np.linalg.norm(a.maps - b.maps) <= 2 * SHARES[name] * np.linalg.norm(a.maps)
            assert b.provenance.kernel_options == OPTIONS[name].names


def test_models_of_one_server_have_options_of_their_own(spec: ModelSpec) -> None:
    fast = spec.replace(name="fast", precision="bfloat16", channels_last=True)
    with Engine([spec, fast], Settings(device="cpu", threads=1)) as engine:
        summaries = {name: model.kernel.summary for name, model in engine.models.items()}
    assert summaries == {"small": "float32", "fast": "bfloat16+channels_last"}


def test_recorded_kernels_need_a_gpu(spec: ModelSpec) -> None:
    with pytest.raises(ConfigurationError, match="cuda_graphs: needs a CUDA device"):
        Engine([spec], Settings(device="cpu", cuda_graphs=True))


def test_a_sure_probability_has_a_gradient_in_half_precision() -> None:
    """Without scaling in the backward pass, its gradient would be below what float16 represents."""
    module = small_cnn()
    with torch.no_grad():
        module[-1].weight[2] *= 30
        module[-1].bias[2] += 15.6
    x = inputs(2)
    exact = run(Kernel(module, device=CPU), x)
    half = run(kernel(module, OPTIONS["float16"]), x)
    assert exact.abs().max() < 6e-8  # the least that float16 holds
    assert (half - exact).norm() <= 0.1 * exact.norm()


def test_a_probability_of_next_to_nothing_has_a_finite_gradient_in_half_precision() -> None:
    """The power of two that would scale it to 1 is above what float32 represents."""
    module = small_cnn()
    with torch.no_grad():
        module[-1].bias[2] += 90
    half = run(kernel(module, OPTIONS["float16"]), inputs(2))
    assert half.isfinite().all()


@pytest.mark.parametrize("option", ["fold", "compile"])
def test_an_option_that_is_tried_at_load_needs_an_input_size(option: str) -> None:
    with pytest.raises(ConfigurationError, match=f'model "model": {option}: .*input_size'):
        Engine([ModelSpec(small_cnn())], Settings(device="cpu", **{option: True}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler uses what torch deprecates
def test_without_a_compiler_the_server_does_not_start(spec: ModelSpec) -> None:
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": (None, "/nowhere/c++"), "force_disable_caches": True}),
        pytest.raises(ConfigurationError, match=r"failed as float32\+compile on an input .*compiler") as refused,
    ):
        Engine([spec], Settings(device="cpu", threads=1, compile=True))
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler uses what torch deprecates
@pytest.mark.parametrize(
    "sizes", [(2, 5), pytest.param((1,), marks=pytest.mark.nightly)], ids=["several examples", "one, compiled apart"]
)
def test_a_compiled_kernel_gives_the_same_maps(sizes: tuple[int, ...]) -> None:
    """Another order of additions: within the tolerance for any neighbors."""
    from torch._inductor import config

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 900, 10))
    exact, compiled = (kernel(module, KernelOptions(compile=each)) for each in (False, True))
    # Otherwise torch compiles programs to test which vector instructions the compiler has, a quarter of the whole time.
    with config.patch({"cpp.vec_isa_ok": True}):
        for n in sizes:
            a, b = (run(each, inputs(n)) for each in (exact, compiled))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(a.abs().max()))


def test_channels_are_reduced_alike(spec: ModelSpec) -> None:
    with Engine([spec], settings("channels_last")) as fast, Engine([spec], Settings(device="cpu", threads=1)) as exact:
        for channels in Channels:
            a, b = (ask(each, inputs(2), channels=channels).maps for each in (exact, fast))
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * np.abs(a).max())
