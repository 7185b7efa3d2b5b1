"""Precision of maps: within the stated share of the maximum by default, and equal bytes for reproducible models."""

import asyncio
import random

import numpy as np
import pytest
import torch
from sidelight_server import (
    Answer,
    ConfigurationError,
    Engine,
    GradCAM,
    Gradient,
    GuidedBackpropagation,
    IntegratedGradients,
    ModelSpec,
    Request,
    Rule,
    Settings,
    SmoothGrad,
    serve,
)
from sidelight_server.models.sources.demo import efficientnet_lite0
from torch import Tensor, nn

from support.models import small_cnn
from support.tolerances import GPU, NEIGHBORS


class Vit(nn.Module):
    """A small vision transformer: patches, attention, a class token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.patches = nn.Conv2d(3, 36, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 36))
        self.places = nn.Parameter(torch.randn(1, 17, 36) * 0.1)
        layer = nn.TransformerEncoderLayer(36, 3, 77, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)  # [n, 16, 36]
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.places
        return self.head(self.encoder(tokens)[:, 0])


def odd_mlp() -> nn.Module:
    """A network of widths for which a row's position decides which vector instructions compute it."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12288, 257), nn.ReLU(), nn.Linear(257, 101), nn.ReLU(), nn.Linear(101, 10)
    )


NETS = {
    "convolutional": (small_cnn, (3, 32, 32)),
    "transformer": (Vit, (3, 32, 32)),
    "mlp of odd widths": (odd_mlp, (3, 64, 64)),
}
METHODS = [
    Gradient(),
    GuidedBackpropagation(),
    SmoothGrad(samples=5),
    IntegratedGradients(steps=5),
    IntegratedGradients(steps=0, rule=Rule.TRAPEZOID, tolerance=0.1, max_rows=33),
]


def asked(net: str) -> list[Request]:
    images = np.random.default_rng(3).standard_normal((4, *NETS[net][1])).astype(np.float32)
    methods = [each for each in METHODS if net != "transformer" or not isinstance(each, GuidedBackpropagation)]
    return [Request(images, method=method) for method in methods]


def under_load(engine: Engine, requests: list[Request]) -> tuple[list[Answer], list[Answer]]:
    """Return the answers alone, and with random neighbors: each example in another batch, order and moment."""
    rng = random.Random(5)

    async def shuffled(request: Request) -> Answer:
        for _ in range(rng.randrange(5)):
            await asyncio.sleep(0)
        return await engine.attribute(request)

    async def run() -> tuple[list[Answer], list[Answer]]:
        alone = [await engine.attribute(each) for each in requests]
        reversed_ = [Request(each.images[::-1].copy(), method=each.method) for each in requests]
        return alone, await asyncio.gather(*(shuffled(each) for each in reversed_ * 3))

    with engine:
        asyncio.run(engine.warm_up())
        return asyncio.run(run())


@pytest.mark.parametrize("net", NETS)
def test_by_default_neighbors_change_a_map_by_no_more_than_is_stated(net: str, device: str) -> None:
    """4e-6 of the map's maximum, in float32 on the CPU, as docs/explanation/precision.md states."""
    make, size = NETS[net]
    engine = Engine([ModelSpec(make(), input_size=size)], Settings(device=device))
    requests = asked(net)
    alone, loaded = under_load(engine, requests)
    for i, answer in enumerate(loaded):
        expected = alone[i % len(requests)].maps
        share = NEIGHBORS if device == "cpu" else GPU
        np.testing.assert_allclose(answer.maps[::-1], expected, rtol=0, atol=share * np.abs(expected).max())


@pytest.mark.parametrize("net", NETS)
def test_reproducible_maps_have_the_same_bytes_under_any_load(net: str, device: str) -> None:
    make, size = NETS[net]
    engine = Engine([ModelSpec(make(), input_size=size)], Settings(device=device, reproducible=True))
    requests = asked(net)
    alone, loaded = under_load(engine, requests)
    for i, answer in enumerate(loaded):
        expected = alone[i % len(requests)]
        assert answer.provenance == expected.provenance
        assert answer.provenance.reproducible
        assert answer.provenance.chunk_rows == 1
        np.testing.assert_array_equal(answer.maps[::-1], expected.maps)


@pytest.mark.parametrize("net", NETS)
def test_more_rows_are_taken_only_where_the_check_shows_the_same_bytes(net: str, device: str) -> None:
    """Whatever the check decides on this machine, chunks of the size that it allows must give the same bytes."""
    make, size = NETS[net]
    settings = Settings(device=device, reproducible=True, reproducible_rows=4)
    engine = Engine([ModelSpec(make(), input_size=size)], settings)
    requests = asked(net)
    try:
        alone, loaded = under_load(engine, requests)
    except ConfigurationError as error:
        assert "another index or with other neighbors; set it to 1" in str(error)  # noqa: PT017
        return
    for i, answer in enumerate(loaded):
        assert answer.provenance.chunk_rows == 4
        np.testing.assert_array_equal(answer.maps[::-1], alone[i % len(requests)].maps)


class PlaceDependent(nn.Module):
    """Its last bits depend on a row's position, as those of some matrix products do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 + 1e-7 * torch.arange(len(x), device=x.device)[:, None])


def test_rows_that_depend_on_their_place_are_found_at_load(device: str) -> None:
    spec = ModelSpec(PlaceDependent(), input_size=(3, 32, 32))
    with (
        pytest.raises(ConfigurationError, match="reproducible_rows: got 4"),
        serve(spec, device=device, reproducible=True, reproducible_rows=4),
    ):
        pytest.fail("it has started")
    with serve(spec, device=device, reproducible=True):
        pass  # alone there is only one position


class Random(nn.Module):
    """Other bytes in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 1e-3 * torch.randn_like(x))


def test_a_nondeterministic_model_cannot_be_reproducible(device: str, caplog: pytest.LogCaptureFixture) -> None:
    spec = ModelSpec(Random(), input_size=(3, 32, 32))
    with (
        pytest.raises(ConfigurationError, match="other bytes each time"),
        serve(spec, device=device, reproducible=True),
    ):
        pytest.fail("it has started")
    with serve(spec, device=device):
        pass  # by default it is served, row by row, and the log says why
    assert "event=runs_differ" in caplog.text


def test_several_rows_of_a_model_without_input_size_cannot_be_checked(device: str) -> None:
    with (
        pytest.raises(ConfigurationError, match="no input size to check it with"),
        serve(small_cnn(), device=device, reproducible=True, reproducible_rows=2),
    ):
        pytest.fail("it has started")


def test_grad_cam_is_reproducible_too(device: str) -> None:
    engine = Engine([ModelSpec(small_cnn(), input_size=(3, 32, 32))], Settings(device=device, reproducible=True))
    images = np.random.default_rng(4).standard_normal((4, 3, 32, 32)).astype(np.float32)
    alone, loaded = under_load(engine, [Request(images, method=GradCAM())])
    for answer in loaded:
        np.testing.assert_array_equal(answer.maps[::-1], alone[0].maps)


def test_a_seed_is_all_that_draws_depend_on(device: str) -> None:
    """The same example has the same map at every position of a batch: its draws depend on the point alone."""
    engine = Engine([ModelSpec(small_cnn())], Settings(device=device, reproducible=True))
    images = np.random.default_rng(4).standard_normal((3, 3, 32, 32)).astype(np.float32)
    images[2] = images[0]
    with engine:
        maps = [
            asyncio.run(engine.attribute(Request(images, method=SmoothGrad(samples=4, seed=seed)))).maps
            for seed in (0, 0, 1)
        ]
    np.testing.assert_array_equal(maps[0][2], maps[0][0])
    np.testing.assert_array_equal(maps[0], maps[1])
    assert not np.allclose(maps[0], maps[2])


def test_the_classifier_of_the_demonstration_keeps_the_promise(device: str) -> None:
    spec = efficientnet_lite0()
    engine = Engine([spec], Settings(device=device, reproducible=True))
    images = np.random.default_rng(6).integers(0, 256, (2, 224, 224, 3), np.uint8)
    alone, loaded = under_load(engine, [Request(images, method=SmoothGrad(samples=2))])
    for answer in loaded:
        np.testing.assert_array_equal(answer.maps[::-1], alone[0].maps)
