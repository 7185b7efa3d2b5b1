"""Many kinds of malformed inputs, and examples on which the model fails, while good requests run."""

import contextlib
import itertools
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

import grpc
import numpy as np
import psutil
import sidelight
from sidelight.v1 import attribution_pb2_grpc

from ...support.held import growth, settled
from ...support.measure import Line, server
from ...support.requests import request
from .model import FAULTS, MODEL, images

N_CONNECTIONS = 1000
SHARE = 4e-6  # of a map's maximum: the promise for an example with other neighbors
SETTINGS = b"\4"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"


class Storm:
    """Callers of all kinds, with counts of their attempts and outcomes."""

    def __init__(self, address: str, port: int, expected: np.ndarray) -> None:
        self.address = address
        self.port = port
        self.expected = expected
        self.done = threading.Event()
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def count(self, what: str, n: int = 1) -> None:
        with self.lock:
            self.counts[what] += n

    def good(self) -> None:
        """Make good calls and streams alternately, and check every map."""
        with sidelight.connect(self.address) as client:
            while not self.done.is_set():
                try:
                    answers = [client.attribute(images(2)), *client.stream(images(2) for _ in range(20))]
                    near = [np.allclose(each.maps, self.expected, rtol=0, atol=self._atol()) for each in answers]
                    self.count("served", sum(near))
                    self.count("wrong", len(near) - sum(near))
                except sidelight.SidelightError as error:
                    self.count("lost")
                    print(f"lost: {error!r}")

    def failing(self) -> None:
        """Send batches whose middle example makes the model fail."""
        with sidelight.connect(self.address) as client:
            for fault in itertools.cycle(range(len(FAULTS))):
                if self.done.wait(0.02):
                    return
                batch = np.concatenate([images(1), images(1), images(1)])
                batch[1, 0, 0, 0] = 1001 + fault
                answer = client.attribute(batch, on_error="return")
                self.count("faults")
                maps = answer.maps
                right = [failure.example for failure in answer.failures] == [1] and all(
                    np.allclose(maps[i], self.expected[0], rtol=0, atol=self._atol()) for i in (0, 2)
                )
                self.count("wrong", not right)

    def malformed(self, seed: int) -> None:
        """Send invalid input, one kind after the other."""
        rng = random.Random(seed)
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            kinds: tuple[Callable[[], None], ...] = (
                lambda: self._message(channel, rng),
                lambda: self._message(channel, rng),
                lambda: self._headers(channel),
                lambda: self._hasty(channel, rng),
                lambda: self._bytes(rng.randbytes(400)),
                lambda: self._bytes(PREFACE + rng.randbytes(400)),
                lambda: self._bytes(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
                lambda: self._bytes(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200)),
            )
            for kind in itertools.cycle(kinds):
                if self.done.is_set():
                    return
                kind()
                self.count("malformed")

    def slow(self) -> None:
        """Hold connections that send a byte every 0.2 s."""
        while not self.done.is_set():
            with contextlib.ExitStack() as stack:
                held = [stack.enter_context(socket.create_connection(("127.0.0.1", self.port))) for _ in range(20)]
                for byte in PREFACE:
                    for each in held:
                        with contextlib.suppress(OSError):
                            each.sendall(bytes([byte]))
                    if self.done.wait(0.2):
                        return
                self.count("malformed", len(held))

    def _atol(self) -> float:
        return SHARE * float(self.expected.max())

    def _message(self, channel: grpc.Channel, rng: random.Random) -> None:
        content = bytearray(request(images(1), sidelight.Gradient()).SerializeToString())
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(min(len(content), 200))] = rng.randrange(256)
        if rng.random() < 0.3:
            content = content[: rng.randrange(len(content))]
        name = rng.choice(["Attribute", "AttributeStream", "GetServerInfo", "Nothing"])
        call = channel.stream_stream(f"/sidelight.v1.AttributionService/{name}")
        with contextlib.suppress(grpc.RpcError):
            for _ in call(iter([bytes(content)]), timeout=20):
                pass

    def _headers(self, channel: grpc.Channel) -> None:
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        with contextlib.suppress(grpc.RpcError):
            stub.Attribute(request(images(1), sidelight.Gradient()), timeout=20, metadata=[("x", "y" * 50_000)])

    def _hasty(self, channel: grpc.Channel, rng: random.Random) -> None:
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        with contextlib.suppress(grpc.RpcError):
            stub.Attribute(request(images(4), sidelight.SmoothGrad()), timeout=rng.choice([0, -1, 0.001, 0.005]))

    def _bytes(self, sent: bytes) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(sent)


def storm(seconds: float) -> list[Line]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    with server(MODEL, address=address) as (_, pid):
        process = psutil.Process(pid)
        with sidelight.connect(address) as client:
            expected = client.attribute(images(2)).maps
        _crowd(address, port)
        _for(seconds / 3, Storm(address, port, expected))  # fills caches and pools
        before = settled(process)
        storm = Storm(address, port, expected)
        n_connected = _crowd(address, port)
        _for(seconds, storm)
        after = settled(process, before)
    counts = storm.counts
    lost = counts["lost"] + counts["wrong"]
    return [
        Line(
            what="good requests lost or answered wrongly beside malformed inputs and faults",
            figure=lost,
            unit="",
            goal="0",
            met=not lost and counts["served"] > 0,
            detail=f"{counts['served']} served, {counts['malformed']} malformed inputs tried, "
            f"{counts['faults']} faults injected in {seconds:g} s; {n_connected} HTTP/2 connections held at once",
        ),
        growth("beside malformed inputs and faults", before, after),
    ]


def _for(seconds: float, storm: Storm) -> None:
    tasks = [storm.good, storm.failing, storm.slow, *(lambda seed=seed: storm.malformed(seed) for seed in (1, 2))]
    threads = [threading.Thread(target=task) for task in tasks]
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    storm.done.set()
    for thread in threads:
        thread.join()


def _crowd(address: str, port: int) -> int:
    """Hold many HTTP/2 connections, and make a good call over another. Returns how many got the server's settings."""
    with contextlib.ExitStack() as stack:
        held = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(N_CONNECTIONS)
        ]
        for each in held:
            each.sendall(PREFACE)
        n_connected = sum(each.recv(9)[3:4] == SETTINGS for each in held)  # the first frame that a server sends
        with sidelight.connect(address) as client:
            assert not client.attribute(images(2)).failures
    return n_connected
