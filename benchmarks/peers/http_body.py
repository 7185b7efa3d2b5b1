"""The HTTP bodies for LitServe and TorchServe: raw pixels in the request, raw bytes or JSON in the response.

Imported in the peers' own environments: the standard library and numpy.
"""

import argparse
import contextlib
import http.client
import struct
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from .driver import Answer, Connection, Image, drive_calls

TYPE = "application/octet-stream"
SIZE = 224
HEAD = struct.Struct("<if")  # the predicted class and its probability; then the map, float32 [H, W]


def pixels_of(body: bytes | bytearray) -> NDArray[np.uint8]:
    """Return the pixels of a request, [H, W, C]."""
    return np.frombuffer(body, np.uint8).reshape(SIZE, SIZE, 3)


def body_of(map_: NDArray[np.float32], predicted: int, probability: float) -> bytes:
    """Return the body of an answer."""
    return HEAD.pack(predicted, probability) + map_.tobytes()


def read_bytes(body: bytes) -> Answer:
    """Return the answer that a body holds."""
    predicted, _ = HEAD.unpack_from(body)
    return Answer(np.frombuffer(body, np.float32, offset=HEAD.size).reshape(SIZE, SIZE), predicted)


def connection(port: int, path: str) -> Connection:
    """Return a function that connects to a server on this machine; connections are kept alive."""

    @contextlib.contextmanager
    def connect() -> Iterator[Callable[[Image], Answer]]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as http_:

            def ask(image: Image) -> Answer:
                http_.request("POST", path, image.tobytes(), {"Content-Type": TYPE})
                reply = http_.getresponse()
                body = reply.read()
                if reply.status != 200:
                    raise RuntimeError(f"{path}: {reply.status} {body[:200]!r}")
                return read_bytes(body)

            yield ask

    return connect


def drive_http(args: argparse.Namespace, path: str) -> None:
    """Run the driver for the server at `args.port`."""
    drive_calls(args.folder, connection(args.port, path))
