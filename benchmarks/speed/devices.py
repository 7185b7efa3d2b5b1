"""Two devices compared with one. The model sleeps for each chunk, as a thread does that waits for a GPU.

Everything except the device is real: the choice of a device, its worker thread, chunks and answers.
"""

import asyncio
import time

import numpy as np
import torch
from sidelight_server import Engine, ModelSpec, Request, Settings
from torch import Tensor, nn

from ..support.measure import Line, in_turns, ratio

CHUNK_S = 0.02
BATCH = 8
N_BATCHES = 64
GOAL = 1.9


class Sleeping(nn.Module):
    """A linear model that takes `CHUNK_S` for a chunk and leaves the GIL to others, as a GPU does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(CHUNK_S)
        return self.linear(x.flatten(1))


def run() -> list[Line]:
    """Measure concurrent batches of the same model on one device and on two."""
    torch.manual_seed(0)
    spec = ModelSpec(Sleeping(), input_size=(3, 8, 8))
    settings = {"threads": 1, "max_chunk_rows": BATCH}
    with (
        Engine([spec], Settings(device="cpu", **settings)) as one,
        Engine([spec], Settings(device="cpu,cpu", **settings)) as two,
    ):
        seconds = in_turns({"one": lambda: _explain(one), "two": lambda: _explain(two)})
    times = ratio(seconds["one"], seconds["two"])
    return [
        Line(
            what="two devices over one, concurrent batches",
            figure=times,
            unit="×",
            goal=f"≥ {GOAL:g}",
            met=times >= GOAL,
            detail=f"devices that sleep {1e3 * CHUNK_S:g} ms for each chunk of {BATCH}; {N_BATCHES} batches",
        )
    ]


def _engine(spec: ModelSpec, device: str) -> Engine:
    return Engine([spec], Settings(device=device, threads=1, max_chunk_rows=BATCH))


def _explain(engine: Engine) -> None:
    request = Request(np.zeros((BATCH, 3, 8, 8), np.float32))

    async def explain() -> None:
        answers = await asyncio.gather(*(engine.attribute(request) for _ in range(N_BATCHES)))
        assert not any(answer.failures for answer in answers)

    asyncio.run(explain())
