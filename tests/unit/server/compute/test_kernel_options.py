"""Kernel options: maps stay within the stated tolerances, and each answer names the kernel."""

import asyncio
import copy
import time

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from scipy.stats import spearmanr
from sidelight_server import (
    Channels,
    Engine,
    GradCAM,
    Gradient,
    GuidedBackpropagation,
    IntegratedGradients,
    ModelSpec,
    Settings,
    SmoothGrad,
)
from sidelight_server.compute.kernel import Kernel
from sidelight_server.compute.replica.batchnorm_fusion import fuse_batchnorm
from sidelight_server.config.options import KernelOptions
from sidelight_server.domain import PREDICTED, Score
from sidelight_server.errors import ConfigurationError
from torch import Tensor, nn

from support.engines import ask
from support.models import small_cnn

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
OPTIONS = {
    "fold": KernelOptions(fold=True),
    "channels_last": KernelOptions(channels_last=True),
    "mixed": KernelOptions(precision="mixed"),
    "mixed, folded": KernelOptions(precision="mixed", fold=True, channels_last=True),
    "bfloat16": KernelOptions(precision="bfloat16"),
    "float16": KernelOptions(precision="float16"),
    "all": KernelOptions(precision="bfloat16", fold=True, channels_last=True),
}
# Relative L2, as measured with room: in float32 the order of additions; with 8 and 11 bits of mantissa a ReLU near its
# corner and a near tie of a max-pool go the other way, which moves single elements by up to half of the maximum.
# With "mixed" no ReLU moves, and each of a few products rounds by at most 2^-8.
SHARES = {
    "fold": 4e-6,
    "channels_last": 4e-6,
    "mixed": 0.01,
    "mixed, folded": 0.01,
    "bfloat16": 0.15,
    "float16": 0.04,
    "all": 0.15,
}


def inputs(n: int = 6) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def kernel(module: nn.Module, options: KernelOptions) -> Kernel:
    return Kernel(module, device=CPU, options=options, trial=inputs(2))


def run(kernel: Kernel, x: Tensor, score: Score = Score.PROBABILITY) -> Tensor:
    gradients = kernel.run(x, [PREDICTED] * len(x), [score] * len(x)).gradients
    assert gradients.dtype == torch.float32
    return gradients


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("score", [Score.PROBABILITY, Score.LOGIT], ids=str)
def test_maps_are_near_those_of_the_exact_kernel(name: str, score: Score) -> None:
    exact = run(Kernel(small_cnn(), device=CPU), inputs(), score)
    near = run(kernel(small_cnn(), OPTIONS[name]), inputs(), score)
    assert (near - exact).norm() <= SHARES[name] * exact.norm()
    for a, b in zip(near, exact, strict=True):
        assert spearmanr(a.abs().amax(0).flatten(), b.abs().amax(0).flatten()).statistic > 0.97
    assert not torch.equal(near, exact) or name == "channels_last"  # it does something


def test_without_an_option_nothing_is_copied() -> None:
    module = small_cnn()
    exact = Kernel(module, device=CPU)
    pointers = {each.data_ptr() for each in module.parameters()}
    assert {each.data_ptr() for each in exact._replica.plain.parameters()} == pointers


@pytest.mark.parametrize("name", OPTIONS)
def test_the_callers_module_stays_as_it_is(name: str) -> None:
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


# The precision of a method, and what it costs.


def test_a_method_runs_in_its_own_precision_beside_the_others(spec: ModelSpec) -> None:
    x = inputs(2)
    plain = {name: Settings(device="cpu", threads=1, precision=name) for name in ("mixed", "bfloat16")}
    asked = {"float32": Gradient(), "mixed": SmoothGrad(4), "bfloat16": IntegratedGradients(4)}
    precisions = {"smoothgrad": "mixed", "integrated_gradients": "bfloat16"}
    with Engine([spec], Settings(device="cpu", threads=1, method_precision=precisions)) as engine:
        asyncio.run(engine.warm_up())
        own = {name: ask(engine, x, method=method) for name, method in asked.items()}
    for name, method in asked.items():
        with Engine([spec], plain.get(name, Settings(device="cpu", threads=1))) as engine:
            assert np.array_equal(own[name].maps, ask(engine, x, method=method).maps)
        assert own[name].provenance.precision == name
    fidelity = {name: answer.provenance.fidelity for name, answer in own.items()}
    assert fidelity["float32"] == 1 > fidelity["mixed"] > fidelity["bfloat16"] > 0.9


def test_a_precision_of_no_method_is_refused(spec: ModelSpec) -> None:
    with pytest.raises(ConfigurationError, match='method_precision: no method "smothgrad"; did you mean "smoothgrad"'):
        Engine([spec], Settings(device="cpu", method_precision={"smothgrad": "mixed"}))
    with pytest.raises(ConfigurationError, match="method_precision: a reproducible model has one precision"):
        Engine([spec], Settings(device="cpu", reproducible=True, method_precision={"smoothgrad": "mixed"}))
    double = ModelSpec(small_cnn().double(), input_size=(3, 32, 32))
    with pytest.raises(ConfigurationError, match="method_precision: needs a model of float32 weights"):
        Engine([double], Settings(device="cpu", method_precision={"smoothgrad": "mixed"}))


def test_a_model_below_the_demanded_fidelity_is_refused(spec: ModelSpec) -> None:
    with Engine([spec], Settings(device="cpu", precision="bfloat16", fidelity=0.9)) as engine:
        asyncio.run(engine.warm_up())
    with (
        Engine([spec], Settings(device="cpu", precision="bfloat16", fidelity=0.99999)) as engine,
        pytest.raises(ConfigurationError, match=r"fidelity: .* in bfloat16 have a rank correlation of 0\.9"),
    ):
        asyncio.run(engine.warm_up())


class SlowInHalfPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            time.sleep(0.02)
        return self.linear(x.flatten(1))


def test_a_precision_that_is_slower_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    slow = ModelSpec(SlowInHalfPrecision(), input_size=(3, 32, 32))
    with Engine([slow], Settings(device="cpu", precision="float16", max_chunk_rows=4)) as engine:
        asyncio.run(engine.warm_up())
    assert 'event=options_slow model="model" configuration=float16' in caplog.text


# Folding.


class Tower(nn.Module):
    """Blocks with a shortcut, a norm that is used twice, one that follows no convolution, and a bias-free layer."""

    def __init__(self, *, shares_output: bool = False) -> None:
        super().__init__()
        self.shares_output = shares_output
        self.first, self.first_norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.twice = nn.BatchNorm2d(8)
        self.wide, self.wide_norm = nn.Linear(8, 12), nn.BatchNorm1d(12)
        self.last = nn.Linear(12, 10)
        for norm in (self.first_norm, self.second_norm, self.twice, self.wide_norm):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.first(x)
        x = self.first_norm(raw).relu()
        if self.shares_output:
            x = x + raw
        x = (x + self.second_norm(self.second(x))).relu()
        x = self.twice(self.twice(x))
        return self.last(self.wide_norm(self.wide(x.mean(dim=(2, 3)))).relu())


def test_folding_changes_neither_outputs_nor_gradients() -> None:
    torch.manual_seed(0)
    module = Tower().double().eval()
    folded = copy.deepcopy(module)
    x = inputs().double()
    assert fuse_batchnorm(folded, x[:2]) == 3
    assert isinstance(folded.first_norm, nn.Identity)
    assert isinstance(folded.twice, nn.BatchNorm2d)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [each(leaf) for each, leaf in zip((module, folded), leaves, strict=True)]
    gradients = [torch.autograd.grad(each[:, 3].sum(), leaf)[0] for each, leaf in zip(outputs, leaves, strict=True)]
    for a, b in ([each.detach() for each in outputs], gradients):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(a.abs().max()))


def test_a_convolution_that_somebody_else_reads_is_found_out_and_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigurationError, match=r"fold: .*leave fold unset"):
        fuse_batchnorm(Tower(shares_output=True).eval(), inputs(2))


def test_a_norm_that_also_does_something_else_is_left_alone() -> None:
    class NormAndRelu(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), NormAndRelu(8), nn.Flatten(), nn.Linear(8 * 900, 10)).eval()
    assert fuse_batchnorm(module, inputs(2)) == 0


class NormAct(nn.BatchNorm2d):
    """As timm's `BatchNormAct2d` has it: a norm, a dropout and an activation in one module."""

    def __init__(self, channels: int, *, reads_first: bool = False) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), nn.SiLU()
        self.reads_first = reads_first

    def forward(self, x: Tensor) -> Tensor:
        if self.reads_first:
            x = self.act(x)
        return self.act(self.drop(super().forward(x)))


def with_norm(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    norm.running_mean.uniform_(-0.5, 0.5)
    norm.running_var.uniform_(0.5, 1.5)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Flatten(), nn.Linear(8 * 900, 10)).eval()


def test_a_norm_with_an_activation_keeps_the_activation() -> None:
    module = with_norm(NormAct(8)).double()
    folded, x = copy.deepcopy(module), inputs(2).double()
    assert fuse_batchnorm(folded, x) == 1
    assert not isinstance(folded[1], nn.BatchNorm2d)
    torch.testing.assert_close(folded(x), module(x), rtol=0, atol=1e-12)


def test_a_norm_that_only_looks_like_one_with_an_activation_is_found_out() -> None:
    with pytest.raises(ConfigurationError, match=r"fold: .*leave fold unset"):
        fuse_batchnorm(with_norm(NormAct(8, reads_first=True)), inputs(2))


def test_a_parametrized_norm_is_folded() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    module = with_norm(nn.BatchNorm2d(8)).double()
    nn.utils.parametrize.register_parametrization(module[1], "weight", Doubled())
    folded, x = copy.deepcopy(module), inputs(2).double()
    assert fuse_batchnorm(folded, x) == 1
    torch.testing.assert_close(folded(x), module(x), rtol=0, atol=1e-12)


def test_a_model_that_reads_a_folded_norm_is_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.convolution(x)).mean((2, 3)) * self.norm.num_features)

    with pytest.raises(ConfigurationError, match=r"fold: .*num_features.*leave fold unset"):
        fuse_batchnorm(Reads().eval(), inputs(2))


def test_networks_in_use_are_folded_whole() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
            self.net = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(pixel_values=x).logits

    module = Logits().eval()
    n_norms = sum(isinstance(each, nn.BatchNorm2d) for each in module.modules())
    assert fuse_batchnorm(module, inputs(2)) == n_norms > 4


# Served.


def settings(name: str) -> Settings:
    options = OPTIONS[name]
    chosen = dict.fromkeys(options.names, True) | {"precision": options.precision}
    return Settings(device="cpu", threads=1, **chosen)


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


def test_answers_and_models_say_what_ran(spec: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sidelight")
    options = {"precision": "bfloat16", "fold": True, "channels_last": True}
    with (
        sidelight_server.serve(spec, device="cpu", **options) as address,
        sidelight.connect(address, connect_timeout=10) as client,
    ):
        model = client.model()
        answer = client.attribute(np.zeros((1, 32, 32, 3), np.uint8))
    assert (model.precision, model.kernel_options) == ("bfloat16", ("fold", "channels_last"))
    tried = {entry.configuration: entry.chosen for entry in model.warmup}
    assert tried["float32"] is False
    assert [entry.configuration for entry in model.warmup if entry.chosen] == ["bfloat16+fold+channels_last"]
    assert answer.provenance.precision == "bfloat16"
    assert answer.provenance.kernel_options == ("fold", "channels_last")
    assert "configuration=bfloat16+fold+channels_last rank_correlation=0.9" in caplog.text
    assert caplog.text.count("event=tried") == len(model.warmup)


@pytest.mark.parametrize("size", [{"max_chunk_rows": 4}, {"reproducible": True, "reproducible_rows": 1}])
def test_what_was_gained_is_measured_also_where_the_settings_say_the_chunk(size: dict[str, object]) -> None:
    spec = ModelSpec(small_cnn(), input_size=(3, 32, 32))
    with Engine([spec], Settings(device="cpu", threads=1, channels_last=True, **size)) as engine:
        asyncio.run(engine.warm_up())
        exact, chosen = engine.model("").warm_up
    assert (exact.configuration, exact.chosen) == ("float32", False)
    assert (chosen.configuration, chosen.chosen) == ("float32+channels_last", True)
    assert exact.rows == chosen.rows == engine.model("").chunk_rows


def test_nothing_is_compared_without_an_option() -> None:
    spec = ModelSpec(small_cnn(), input_size=(3, 32, 32))
    with Engine([spec], Settings(device="cpu", threads=1, max_chunk_rows=4)) as engine:
        asyncio.run(engine.warm_up())
        assert engine.model("").warm_up == ()


def test_the_digest_is_that_of_the_callers_weights(spec: ModelSpec) -> None:
    with Engine([spec], settings("all")) as fast, Engine([spec], Settings(device="cpu")) as exact:
        assert fast.model("").digest == exact.model("").digest


def test_models_of_one_server_have_options_of_their_own(spec: ModelSpec) -> None:
    fast = spec.replace(name="fast", precision="bfloat16", channels_last=True)
    with Engine([spec, fast], Settings(device="cpu", threads=1)) as engine:
        summaries = {name: model.kernel.summary for name, model in engine.models.items()}
    assert summaries == {"small": "float32", "fast": "bfloat16+channels_last"}


def test_a_precision_that_there_is_not_is_refused(spec: ModelSpec) -> None:
    with pytest.raises(ConfigurationError, match="precision: got 'int8': Input should be 'float32', "):
        Engine([spec.replace(precision="int8")])


def test_recorded_kernels_want_a_gpu(spec: ModelSpec) -> None:
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


def test_copies_that_cannot_be_folded_again_serve_no_more() -> None:
    """The digest is that of the new weights, so the map must be theirs too."""
    module = small_cnn()
    folded = kernel(module, OPTIONS["fold"])
    first = run(folded, inputs())
    with torch.no_grad():
        weight = module[0].weight.clone()
        module[0].weight.fill_(float("nan"))
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="fold: "):
            run(folded, inputs())
    with torch.no_grad():
        module[0].weight.copy_(weight)
    assert torch.equal(run(folded, inputs()), first)


def test_the_log_says_how_many_norms_were_folded(spec: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sidelight")
    with Engine([spec], settings("fold")):
        assert 'event=folded model="small" norms=1' in caplog.text


def test_where_nothing_is_folded_the_log_warns_and_answers_do_not_name_it(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 900, 10)).eval()
    with Engine([ModelSpec(module, input_size=(3, 32, 32), name="plain")], settings("fold")) as engine:
        assert 'event=not_folded model="plain"' in caplog.text
        assert ask(engine, inputs(2)).provenance.kernel_options == ()


@pytest.mark.parametrize("option", ["fold", "compile"])
def test_what_is_tried_first_needs_an_input_size(option: str) -> None:
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
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 900, 10))
    exact, compiled = (kernel(module, KernelOptions(compile=each)) for each in (False, True))
    for n in sizes:
        a, b = (run(each, inputs(n)) for each in (exact, compiled))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(a.abs().max()))


def test_channels_are_reduced_alike(spec: ModelSpec) -> None:
    with Engine([spec], settings("channels_last")) as fast, Engine([spec], Settings(device="cpu", threads=1)) as exact:
        for channels in Channels:
            a, b = (ask(each, inputs(2), channels=channels).maps for each in (exact, fast))
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-4 * np.abs(a).max())
