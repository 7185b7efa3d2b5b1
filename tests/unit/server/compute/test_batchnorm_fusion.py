"""BatchNorm fusion: what is fused, and what is left alone or refused."""

import copy

import pytest
import torch
from sidelight_server import (
    Engine,
    ModelSpec,
)
from sidelight_server.compute.replica.batchnorm_fusion import fuse_batchnorm
from sidelight_server.errors import ConfigurationError
from torch import Tensor, nn

from support.engines import ask
from support.models import small_cnn
from support.models.kernels import OPTIONS, inputs, kernel, run, settings

pytestmark = pytest.mark.slow


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


def test_fusion_is_refused_where_another_layer_also_reads_the_convolution() -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigurationError, match=r"fold: .*leave fold unset"):
        fuse_batchnorm(Tower(shares_output=True).eval(), inputs(2))


def test_a_subclass_of_batchnorm_that_computes_more_is_not_fused() -> None:
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


def test_a_norm_that_activates_before_it_normalizes_is_refused() -> None:
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
