"""Recalibration: measures chunk sizes again, because the cores may have been busy when a model was loaded."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ..devices.device import Device
from .registry import Registry

FIRST_S = 60.0  # time until the first measurement; the interval doubles each time
POLL_S = 1.0


async def recalibrate(
    registry: Registry, devices: Sequence[Device], *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> None:
    """Measure chunk sizes again after 1 minute, after 2 more, 4 more, and so on, until cancelled.

    Each time it waits until all devices are idle: a run of several times the chunk size would delay requests.
    """
    wait_s = FIRST_S
    while True:
        await sleep(wait_s)
        while not all(device.is_idle for device in devices):
            await sleep(POLL_S)
        await registry.measure_again()
        wait_s *= 2
