"""Models of any input size: the memory of a row is measured for each size and limits the chunk.

`device_memory_limit` simulates a device with that much memory.
"""

import asyncio
import logging

import numpy as np
import pytest
import torch
from sidelight_server import Answer, Engine, IntegratedGradients, ModelSpec, Occlusion, Request, Settings
from sidelight_server.errors import ResourceExhausted
from torch import Tensor, nn

from support.models import N_CLASSES
from support.tolerances import NEIGHBORS

pytestmark = pytest.mark.slow

LIMIT = 8 * 2**20
RESOURCE_EXHAUSTED = ResourceExhausted.code
# Its graph keeps about 3 times 8 float32 for each pixel.
SMALL, MIDDLE, HUGE = 16, 128, 750


class Sized(nn.Module):
    """A network for any size, which records the rows and pixels of each pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, N_CLASSES)
        self.chunks: list[tuple[int, int]] = []  # rows, pixels
        self.largest = 0  # pixels that the second layer was reached with

    def forward(self, x: Tensor) -> Tensor:
        self.chunks.append((len(x), x.shape[2] * x.shape[3]))
        x = self.first(x).relu().square()
        self.largest = max(self.largest, x.shape[2] * x.shape[3])
        return self.last(self.second(x).relu().mean(dim=(2, 3)))

    def __deepcopy__(self, memo: dict[int, object]) -> "Sized":
        return self


def images(n: int, side: int) -> np.ndarray:
    return np.random.default_rng(side).standard_normal((n, 3, side, side), np.float32)


def explain(engine: Engine, n: int, side: int, **question: object) -> Answer:
    return asyncio.run(engine.attribute(Request(images(n, side), **question)))


def limited(module: nn.Module, device: str, **settings: object) -> Engine:
    settings = {"device_memory_limit": LIMIT, "threads": 1} | settings
    return Engine([ModelSpec(module)], Settings(device=device, **settings))


@pytest.mark.parametrize("is_first", [True, False], ids=["the first of all", "a later one"])
def test_a_picture_that_memory_lacks_for_is_refused_and_the_next_one_answered(
    is_first: bool, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    module = Sized()
    with limited(module, device) as engine, caplog.at_level(logging.WARNING, "sidelight"):
        if not is_first:
            assert not explain(engine, 1, SMALL).failures
        huge = explain(engine, 2, HUGE)
        small = explain(engine, 2, SMALL)
        assert engine.model("").chunk_rows == 8  # of other sizes
    assert [failure.code for failure in huge.failures] == [RESOURCE_EXHAUSTED] * 2
    for fragment in (f"[3, {HUGE}, {HUGE}]", "device_memory_limit", f"{LIMIT} bytes"):
        assert fragment in huge.failures[0].message
    assert not small.failures
    assert module.largest < HUGE * HUGE  # the pass ended before it had all that it wanted
    assert any("event=too_large" in message for message in caplog.messages)


@pytest.mark.parametrize("method", [None, IntegratedGradients(steps=4), Occlusion(window=(32, 32), stride=(32, 32))])
def test_rows_that_memory_lacks_for_together_run_in_smaller_chunks(method: object, device: str) -> None:
    module, question = Sized(), {} if method is None else {"method": method}
    n = 8
    with limited(module, device) as engine:
        explain(engine, 1, SMALL)
        module.chunks.clear()
        answer = explain(engine, n, MIDDLE, **question)
        sizes = {rows for rows, _ in module.chunks}
        again = explain(engine, n, MIDDLE, **question)
        alone = [asyncio.run(engine.attribute(Request(each[None], **question))) for each in images(n, MIDDLE)]
        explain(engine, n, SMALL)
    assert not answer.failures
    assert 1 < max(sizes) < 8
    assert module.chunks[-1] == (8, SMALL * SMALL)  # the others' chunks are as they were
    # Differences of probabilities, as occlusion's are, keep the rounding of those: 6e-8 each at most.
    tolerance = max(NEIGHBORS * np.abs(answer.maps).max(), 1.2e-7)
    for together in (answer, again):
        for map_, expected in zip(together.maps, alone, strict=True):
            np.testing.assert_allclose(map_, expected.maps[0], rtol=0, atol=tolerance)


def test_a_size_that_is_known_is_not_measured_again(device: str) -> None:
    module = Sized()
    with limited(module, device) as engine:
        explain(engine, 8, SMALL)
        module.chunks.clear()
        explain(engine, 8, SMALL)
    assert module.chunks == [(8, SMALL * SMALL)]


def test_the_number_of_remembered_input_sizes_is_bounded(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidelight_server.models.row_memory.MAX_SHAPES", 4)
    with limited(Sized(), device) as engine:
        for side in range(8, 24):
            assert not explain(engine, 1, side).failures
        model = engine.model("")
    assert len(model._memory._row_bytes) == len(model._memory.shapes) == 4
