"""The attacked server, the attackers' processes, and what the server holds afterwards."""

import contextlib
import multiprocessing
import os
import socket
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from multiprocessing.synchronize import Barrier, Event
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from ...support.held import without_reserve
from ...support.measure import server
from ...support.nets import resnet18_small
from .attacks import Attack

MODEL = "python:benchmarks.soak.attack.server:spec"
START_S = 120.0
HELD = {f"sidelight_{each}" for each in ("batches_in_flight", "in_flight_bytes", "rows_in_flight", "streams_open")}


def spec() -> object:
    """Return the model, for `MODEL`."""
    without_reserve()
    return resnet18_small()


class Served(NamedTuple):
    """A running server. The good callers use another address than the attackers, so that they do not share a quota."""

    address: str
    good_address: str
    metrics_address: str
    pid: int

    def held(self) -> dict[str, float]:
        """Return what requests and streams hold, by metric name."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics") as response:
            families = text_string_to_metric_families(response.read().decode())
            return {each.name: sum(sample.value for sample in each.samples) for each in families if each.name in HELD}


@contextlib.contextmanager
def served(*flags: str) -> Iterator[Served]:
    """Run a server."""
    address, metrics_address = (f"127.0.0.1:{port}" for port in _free_ports(2))
    with tempfile.TemporaryDirectory(prefix="sidelight-") as folder:
        good = f"unix:{folder}/good"
        flags = ("--listen", good, "--metrics-listen", metrics_address, *flags)
        with server(MODEL, *flags, address=address) as (_, pid):
            yield Served(address, good, metrics_address, pid)


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [each.getsockname()[1] for each in sockets]


def _patiently(attack: Attack, address: str, imported: Barrier, stop: Event, is_last: bool) -> None:
    """Attack at the lowest priority: real attackers use their own machines."""
    os.nice(19)
    imported.wait()
    with contextlib.suppress(Exception) if is_last else contextlib.nullcontext():
        attack(address, stop)


@contextlib.contextmanager
def attacked(address: str, attacks: Mapping[str, Attack], *, is_last: bool = False) -> Iterator[None]:
    """Run attacks while the block runs, each in a process of its own. `is_last`: the server may end before they do.

    The block and the attacks begin once all processes have imported what they need, which takes seconds of CPU time.
    """
    context = multiprocessing.get_context("spawn")
    stop, imported = context.Event(), context.Barrier(len(attacks) + 1)
    processes = {
        name: context.Process(target=_patiently, args=(attack, address, imported, stop, is_last), daemon=True)
        for name, attack in attacks.items()
    }
    for process in processes.values():
        process.start()
    try:
        imported.wait(START_S)
        yield
        if not is_last and (failed := [name for name, process in processes.items() if process.exitcode]):
            raise RuntimeError(f"attacks that failed themselves: {', '.join(failed)}")
    finally:
        stop.set()
        for process in processes.values():
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()
