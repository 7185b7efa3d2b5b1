"""Recalibration: chunk sizes are measured again, because the cores may have been busy when a model was loaded."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from .device import Device
from .registry import Registry

FIRST_S = 60.0  # after the start; each time after twice as long
PATIENCE_S = 60.0  # a server whose chunks are too small may never be idle
LOOK_S = 1.0


class Recalibration:
    """Has chunk sizes measured again: 1 minute after the start, 2 after that, 4, and so on.

    It prefers a moment in which no request is at a device, but does not wait for one for long.
    """

    def __init__(
        self,
        registry: Registry,
        devices: Sequence[Device],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._registry = registry
        self._devices = devices
        self._sleep = sleep

    async def run(self) -> None:
        """Measure, again and again, until cancelled."""
        wait_s = FIRST_S
        while True:
            await self._sleep(wait_s)
            await self._wait_until_idle()
            await self._registry.measure_again()
            wait_s *= 2

    async def _wait_until_idle(self) -> None:
        left_s = PATIENCE_S
        while left_s > 0 and any(device.n_rows for device in self._devices):
            await self._sleep(LOOK_S)
            left_s -= LOOK_S
