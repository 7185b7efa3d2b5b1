"""Recalibration: measures chunk sizes again, because the cores may have been busy when a model was loaded."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from ..devices.device import Device
from .registry import Registry

FIRST_S = 60.0  # time until the first measurement; the interval doubles each time
POLL_S = 1.0


class Recalibration:
    """Measures chunk sizes again: 1 minute after the start, then after 2 more, 4 more, and so on.

    Each time it waits until all devices are idle: a run of several times the chunk size would delay requests.
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
        """Measure periodically, until cancelled."""
        wait_s = FIRST_S
        while True:
            await self._sleep(wait_s)
            while not all(device.is_idle for device in self._devices):
                await self._sleep(POLL_S)
            await self._registry.measure_again()
            wait_s *= 2
