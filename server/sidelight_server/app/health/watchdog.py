"""The watchdog: logs when a device's thread is stuck, and when it makes progress again."""

import asyncio
import logging
from collections.abc import Callable

from ...engine.devices.device import Device
from ...engine.engine import Engine
from ...telemetry.logs import Event

log = logging.getLogger("sidelight")

CHECKS = 4  # checks within `stuck_s`
MAX_EVERY_S = 1.0


class Watchdog:
    """Checks the heartbeats of an engine's devices, and calls `on_check` after each check. Runs on the event loop."""

    def __init__(self, engine: Engine, *, on_check: Callable[[], None]) -> None:
        self._engine = engine
        self._on_check = on_check
        self._every_s = min(MAX_EVERY_S, engine.settings.stuck_s / CHECKS)
        self._stuck: set[Device] = set()

    async def run(self) -> None:
        """Check periodically, until cancelled."""
        while True:
            self.check()
            await asyncio.sleep(self._every_s)

    def check(self) -> None:
        for device in self._engine.devices:
            heartbeat = device.worker.heartbeat
            if heartbeat.is_stuck and device not in self._stuck:
                self._stuck.add(device)
                log.error(Event(
                    "device_stuck", device=device.torch_device, seconds=round(heartbeat.at_work_s, 1),
                    longest_s=round(heartbeat.longest_s, 3), unanswered=self._engine.n_unanswered,
                ))  # fmt: skip
            elif device in self._stuck and not heartbeat.is_stuck:
                self._stuck.discard(device)
                if device.worker.is_alive:
                    log.warning(Event("device_moves", device=device.torch_device))
        self._on_check()
