"""Rows of all methods together: every map equals the serial one, with any neighbors and any earlier rows.

Neighbors change only the last bits: a library may add up in another order in a chunk of another size, about 1e-6 of a
map's maximum in float32 for one gradient. A map that is the difference of two forward passes, or that ends near zero
where many gradients cancel, keeps that much of what it was computed from: so 4e-6 is allowed.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from sidelight_server import (
    RISE,
    Answer,
    Channels,
    Contrast,
    Engine,
    ExpectedGradients,
    GradCAM,
    Gradient,
    GuidedBackpropagation,
    IntegratedGradients,
    LayerGradientXActivation,
    ModelSpec,
    Occlusion,
    Request,
    Rule,
    Score,
    Settings,
    SmoothGrad,
    TopK,
)
from sidelight_server.methods import Method

from support.models import small_cnn
from support.tolerances import NEIGHBORS

pytestmark = pytest.mark.slow

SHAPE = (3, 16, 16)
N_REQUESTS = 105


def question(method: Method, **more: object) -> Request:
    return Request(np.empty(0), method=method, **more)


# What does not hook into the model, and what does: on a shared module the hooks would meet the others' rows.
PLAIN = {
    "gradient": question(Gradient()),
    "gradient of another score": question(Gradient(), score=Score.LOG_PROBABILITY, target=3),
    "gradient of a margin": question(Gradient(times_input=True), score=Score.MARGIN),
    "integrated gradients": question(IntegratedGradients(12), score=Score.LOGIT),
    "integrated gradients of a contrast": question(IntegratedGradients(7, Rule.TRAPEZOID), target=Contrast(2, 5)),
    "smoothgrad": question(SmoothGrad(8), channels=Channels.SUM),
    "smoothgrad of integrated gradients": question(SmoothGrad(3, base=IntegratedGradients(4))),
    "expected gradients": question(ExpectedGradients(9, noise_level=0.1), target=7),
    "occlusion": question(Occlusion((8, 8), (4, 4)), score=Score.LOGIT),
    "rise": question(RISE(masks=12, cells=4), score=Score.LOGIT),
}
HOOKED = {
    "guided backpropagation": question(GuidedBackpropagation()),
    "guided smoothgrad": question(SmoothGrad(4, base=GuidedBackpropagation())),
    "grad-cam": question(GradCAM(keep_negative=True), score=Score.LOGIT),
    "grad-cam of the top": question(GradCAM("3", keep_negative=True), target=TopK(3)),
    "layer gradient times activation": question(LayerGradientXActivation("1"), target=4),
}
REQUESTS = PLAIN | HOOKED


def images(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, *SHAPE)).astype(np.float32)


EXAMPLE = images(1, seed=99)


def engine_of(max_chunk_rows: int) -> Engine:
    spec = ModelSpec(small_cnn(3, size=16), input_size=SHAPE)
    return Engine([spec], Settings(device="cpu", threads=1, max_chunk_rows=max_chunk_rows))


def asked(request: Request, x: np.ndarray) -> Request:
    return replace(request, images=x)


async def all_at_once(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    return await asyncio.gather(*(engine.attribute(each) for each in requests))


def assert_same(answer: Answer, expected: Answer) -> None:
    assert not answer.failures
    share = np.abs(expected.maps).max(axis=tuple(range(1, expected.maps.ndim)), keepdims=True)
    assert (np.abs(answer.maps - expected.maps) <= NEIGHBORS * share).all()
    for each, other in zip(answer.explanations, expected.explanations, strict=True):
        assert [one.index for one in each.targets] == [one.index for one in other.targets]
        assert (each.convergence and each.convergence.rows) == (other.convergence and other.convergence.rows)


@pytest.mark.parametrize("max_chunk_rows", [3, 32])
def test_methods_with_hooks_beside_plain_ones_leave_every_map_as_it_is_alone(max_chunk_rows: int) -> None:
    names = [list(REQUESTS)[n % len(REQUESTS)] for n in range(N_REQUESTS)]
    requests = [asked(REQUESTS[name], images(1 + (n % 5 == 0), seed=n % 13)) for n, name in enumerate(names)]
    with engine_of(max_chunk_rows) as engine:
        serial = [asyncio.run(engine.attribute(each)) for each in requests]
        together = asyncio.run(all_at_once(engine, requests))
    for answer, expected in zip(together, serial, strict=True):
        assert_same(answer, expected)


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    """The map of one example by each method, its rows run one by one."""
    with engine_of(1) as engine:
        return {name: asyncio.run(engine.attribute(asked(each, EXAMPLE))).maps[0] for name, each in REQUESTS.items()}


@pytest.mark.parametrize(
    "rows",
    [1, 2, 3, 5, 8, *(pytest.param(rows, marks=pytest.mark.nightly) for rows in (4, 6, 7, 9))],
    ids=lambda rows: f"{rows} rows",
)
def test_one_example_has_one_map_in_every_place_and_neighborhood(rows: int, alone: dict[str, np.ndarray]) -> None:
    with engine_of(rows) as engine:
        for place in range(rows):
            neighbors = images(rows, seed=100 + 10 * rows + place)
            neighbors[place] = EXAMPLE[0]
            some = list(REQUESTS)[place % 3 :: 3] if place else list(REQUESTS)
            answers = asyncio.run(all_at_once(engine, [asked(REQUESTS[name], neighbors) for name in some]))
            for name, answer in zip(some, answers, strict=True):
                miss = np.abs(answer.maps[place] - alone[name]).max() / np.abs(alone[name]).max()
                assert miss <= NEIGHBORS, (name, place)


def test_no_hook_remains_on_the_callers_module() -> None:
    module = small_cnn(3, size=16)
    with Engine([ModelSpec(module, input_size=SHAPE)], Settings(device="cpu")) as engine:
        asyncio.run(all_at_once(engine, [asked(each, images(2, seed=1)) for each in HOOKED.values()]))
    for each in module.modules():
        assert not each._forward_hooks
        assert not each._forward_pre_hooks
        assert not each._backward_hooks
    assert torch.overrides._get_current_function_mode() is None
