"""The cost of the metrics on the event loop for each batch, as a share of one call of a small model."""

import asyncio
import statistics

import numpy as np
import sidelight
from sidelight_server import Engine, Request, Settings
from sidelight_server.domain import Answer
from sidelight_server.telemetry.counters import Tally
from sidelight_server.telemetry.recorder import Telemetry

from ..support.measure import Line, in_turns, ratio, server
from ..support.nets import SMALL, small_cnn

N_CALLS = 500
N_COUNTED = 20_000
GOAL = 0.01


def run() -> list[Line]:
    """Measure the metrics and the call in one run."""
    image = np.zeros((1, SMALL, SMALL, 3), np.uint8)
    answer, telemetry = _answer(image), Telemetry()

    def counted() -> None:
        for _ in range(N_COUNTED):
            call_record = telemetry.begin("Attribute", tuple)
            telemetry.answered(call_record, answer, Tally.of(answer))
            telemetry.end(call_record)

    with server("python:benchmarks.support.nets:small_cnn") as (address, _), sidelight.connect(address) as client:

        def called() -> None:
            for _ in range(N_CALLS):
                client.attribute(image)

        seconds = in_turns({"counted": counted, "called": called})
    share = ratio(seconds["counted"], seconds["called"]) * N_CALLS / N_COUNTED
    one_s = statistics.median(seconds["counted"]) / N_COUNTED
    return [
        Line(
            what="counting a batch for the metrics, over one unary call of a small CNN at 64²",
            figure=100 * share,
            unit="%",
            goal=f"< {100 * GOAL:g}",
            met=share < GOAL,
            detail=f"{1e6 * one_s:.1f} µs; a call takes {1e3 * statistics.median(seconds['called']) / N_CALLS:.1f} ms",
        )
    ]


def _answer(image: np.ndarray) -> Answer:
    with Engine([small_cnn()], Settings(device="cpu")) as engine:
        return asyncio.run(engine.attribute(Request(image)))
