"""Checks at load: wrong gradients are detected, and so are rows that depend on each other."""

import asyncio
import functools
import logging
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
import transformers
from sidelight_server import Engine, ModelSpec, Occlusion, Settings
from sidelight_server.models.trial.checks import gradient_fault, is_batch_dependent
from sidelight_server.models.trial.in_turn import at_once
from torch import Tensor, nn

from support.engines import ask
from support.models import small_cnn

SIZE = (3, 32, 32)
EXAMPLE = torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(0))


def fault(module: nn.Module, example: Tensor = EXAMPLE) -> str:
    return gradient_fault(module.eval(), example, in_turn=at_once)


def touch(module: nn.Module, example: Tensor = EXAMPLE) -> bool:
    return is_batch_dependent(module.eval(), example, in_turn=at_once, most=16, dtype=example.dtype)


def convolutional(*between: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return two convolutions with something between them and behind."""
    torch.manual_seed(seed)
    first, *others = (make() for make in between)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        first,
        nn.BatchNorm2d(16),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3),
        *others,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def transformer(kind: str, **given: object) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(num_labels=10, **given)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = getattr(transformers, f"{kind}ForImageClassification")(config)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).logits

    return Logits()


SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
VIT = functools.partial(transformer, "ViT", image_size=32, patch_size=8, **SMALL)
ORDINARY: dict[str, Callable[[], nn.Module]] = {
    "cnn": small_cnn,
    "relu": lambda: convolutional(nn.ReLU, nn.ReLU),
    "gelu": lambda: convolutional(nn.GELU, nn.GELU),
    "hard swish": lambda: convolutional(nn.Hardswish, nn.Hardsigmoid),
    "leaky": lambda: convolutional(nn.LeakyReLU, nn.ELU),
    "probabilities": lambda: nn.Sequential(small_cnn(), nn.Softmax(dim=1)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)),
    "vit": VIT,
    "beit": lambda: transformer("Beit", image_size=32, patch_size=8, **SMALL),
    "swin": lambda: transformer(
        "Swin", image_size=32, patch_size=2, embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=4
    ),
    "resnet": lambda: transformer(
        "ResNet", depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128], layer_type="basic", embedding_size=16
    ),
    "mobilenet": lambda: transformer("MobileNetV2", depth_multiplier=0.35),
    "convnext": lambda: transformer("ConvNext", depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128]),
    "half": lambda: small_cnn().to(torch.bfloat16),
    "double": lambda: small_cnn().double(),
}


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("seed", range(3))
def test_an_ordinary_network_passes(name: str, seed: int) -> None:
    module = ORDINARY[name]()
    dtype = next(module.parameters()).dtype
    example = torch.rand(1, *SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert fault(module, example) == ""
    assert not touch(module, example)


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.values, self.gates, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3), nn.Linear(16, 10)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.values(x) * self.gate(self.gates(x))).mean((2, 3)))


class Branched(nn.Module):
    """Two networks added, the second one's input detached."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.first, self.second = convolutional(nn.GELU, nn.GELU), convolutional(nn.ReLU, nn.ReLU, seed=1)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.share * self.second(x.detach())


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def quantized(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # of torch at its own quantization
        return torch.ao.quantization.quantize_dynamic(module.eval(), {nn.Linear}, dtype=torch.qint8)


PARTIAL: dict[str, Callable[[], nn.Module]] = {
    "int8 vit": lambda: quantized(VIT()),
    "int8 cnn": lambda: quantized(small_cnn()),
    "rounded gate": lambda: Gated(lambda z: (z.sigmoid() * 255).round() / 255),
    "coarsely rounded gate": lambda: Gated(lambda z: (z.sigmoid() * 16).round() / 16),
    "open or shut": lambda: Gated(lambda z: (z > 0).to(z.dtype)),
    "detached gate": lambda: Gated(lambda z: z.sigmoid().detach()),
    "detached branch": lambda: Branched(1.0),
    "weak detached branch": lambda: Branched(0.3),
    "detached": lambda: nn.Sequential(small_cnn(), Lambda(lambda y: y.detach())),
}


@pytest.mark.parametrize("name", PARTIAL)
@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_that_misses_a_part_of_the_outputs_is_detected(name: str, seed: int) -> None:
    size = (3, 64, 64) if "gate" in name or "shut" in name else SIZE  # of 900 gates too few change to tell
    assert fault(PARTIAL[name](), torch.rand(1, *size, generator=torch.Generator().manual_seed(seed)))


SETTINGS = Settings(device="cpu", threads=1)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")  # torch warns of what the check detects
@pytest.mark.parametrize("name", ["int8 cnn", "detached gate", "detached"])
def test_a_model_without_the_whole_gradient_serves_what_needs_none(name: str, caplog: pytest.LogCaptureFixture) -> None:
    module = PARTIAL[name]().eval()
    x = np.random.default_rng(0).random((2, *SIZE), np.float32)
    with (
        caplog.at_level(logging.WARNING),
        sidelight_server.serve(ModelSpec(module, input_size=SIZE), device="cpu", max_chunk_rows=8) as address,
        sidelight.connect(address) as client,
    ):
        assert set(client.model().methods) == {"occlusion", "rise"}
        with pytest.raises(sidelight.FailedPrecondition, match="occlusion or rise"):
            client.attribute(x)
        answer = client.attribute(x, method=sidelight.Occlusion(window=8), score="logit")
    assert "gradient_fault" in caplog.text
    # By hand: the logit of what was predicted, whole and with its first window hidden.
    with torch.no_grad():
        hidden = torch.tensor(x)
        hidden[:, :, :8, :8] = 0
        whole, without = module(torch.tensor(x)), module(hidden)
    first = whole.argmax(1, keepdim=True)
    expected = (whole - without).gather(1, first)[:, 0].numpy()
    # int8 rounds with the range of the whole chunk: that is the reason for the tolerance.
    np.testing.assert_allclose(answer.maps[:, 0, 0], expected, rtol=0.05, atol=0.01)


def test_an_operator_may_accept_a_gradient_that_misses_a_part() -> None:
    module = PARTIAL["detached gate"]()
    settings = Settings(device="cpu", threads=1, accept_partial_gradient=True)
    with Engine([ModelSpec(module, input_size=SIZE)], settings) as engine:
        assert not ask(engine, torch.rand(1, *SIZE)).failures


def test_an_ordinary_model_supports_all_methods() -> None:
    with Engine([ModelSpec(small_cnn(), input_size=SIZE)], SETTINGS) as engine:
        assert len(engine.model("").methods) == 9


class Company(nn.Module):
    def __init__(self, among: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.among = small_cnn(), among

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.among(x))


class BatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.detach().mean((0, 2, 3), keepdim=True), x.detach().var((0, 2, 3), keepdim=True)
        return (x - mean) / (var + self.eps).sqrt()


TOUCHING: dict[str, Callable[[], nn.Module]] = {
    "detached mean": lambda: Company(lambda x: x - x.detach().mean(0, keepdim=True)),
    "largest of the batch": lambda: Company(lambda x: x / x.detach().amax()),
    "from three on": lambda: Company(lambda x: x - x[2:].detach().mean() if len(x) > 2 else x),
    "from four on, before": lambda: Company(lambda x: torch.cat([x[:1], x[1:] - x[:-1].detach()]) if len(x) > 3 else x),
    "from nine on": lambda: Company(lambda x: x * (1 + 0.1 * (len(x) > 8) * x.detach().mean())),
    "statistics of the batch": lambda: nn.Sequential(BatchNorm(3), small_cnn()),
}


@pytest.mark.parametrize("name", TOUCHING)
def test_rows_that_depend_on_each_other_are_detected_and_run_alone(name: str) -> None:
    module = TOUCHING[name]().eval()
    assert touch(module)
    x = torch.rand(4, *SIZE, generator=torch.Generator().manual_seed(5))
    with Engine([ModelSpec(module, input_size=SIZE)], Settings(device="cpu", threads=1, max_chunk_rows=16)) as engine:
        asyncio.run(engine.warm_up())
        assert engine.model("").chunk_rows == 1
        together = ask(engine, x, method=Occlusion((16, 16))).maps
        alone = [ask(engine, each[None], method=Occlusion((16, 16))).maps[0] for each in x]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_a_model_that_takes_no_more_than_a_few_rows_runs_alone(caplog: pytest.LogCaptureFixture) -> None:
    def few(x: Tensor) -> Tensor:
        if len(x) > 4:
            raise ValueError("at most four")
        return x

    settings = Settings(device="cpu", threads=1, max_chunk_rows=16)
    with caplog.at_level(logging.WARNING), Engine([ModelSpec(Company(few), input_size=SIZE)], settings) as engine:
        asyncio.run(engine.warm_up())
        assert engine.model("").chunk_rows == 1
    assert "at most four" in caplog.text
