"""Coverage-guided fuzzing with atheris of the code that reads messages and files. `make fuzz`.

`python -m benchmarks.soak.fuzz wire --seconds 60`, or `files`. It ends at the first unexpected exception, and
writes the bytes that caused it into the current folder.
"""

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris
import numpy as np
from PIL import Image

with atheris.instrument_imports(include=["sidelight_server", "sidelight", "PIL"]):
    from sidelight.v1 import attribution_pb2 as pb
    from sidelight_server.errors import SidelightError
    from sidelight_server.inputs.decoding import decode
    from sidelight_server.wire import codec, requests

import sidelight

from ..support.requests import request

MAX_PIXELS = 1_000_000
METHODS = (
    sidelight.Gradient(),
    sidelight.SmoothGrad(),
    sidelight.IntegratedGradients(),
    sidelight.GradCAM(),
    sidelight.Occlusion(window=4),
)


def messages(content: bytes) -> None:
    """Parse bytes as a unary and as a stream request, with and without cutting out the tensor, and validate it."""
    for read, large_bytes in itertools.product((codec.decode_request, codec.decode_stream_request), (0, 2**20)):
        codec.LARGE_BYTES = large_bytes  # type: ignore[attr-defined]  # where `codec` looks it up
        received = read(content)
        if isinstance(received, codec.Unreadable):
            continue
        message = received.message
        if isinstance(message, pb.AttributeStreamRequest):
            message = message.attribute
        with contextlib.suppress(SidelightError):
            requests.timeout_s(message)
            requests.parse(message, received.data)


def files(content: bytes) -> None:
    """Decode bytes as an image file."""
    for channels in (1, 3):
        with contextlib.suppress(SidelightError):
            decode(content, channels=channels, max_pixels=MAX_PIXELS)


def seeds(target: str) -> list[bytes]:
    """Return valid inputs, the initial corpus."""
    if target == "wire":
        image = np.zeros((1, 3, 2, 2), np.float32)
        return [request(image, method).SerializeToString() for method in METHODS]
    made = []
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"):
        file = io.BytesIO()
        Image.new("RGB", (7, 5), (200, 100, 50)).save(file, kind)
        made.append(file.getvalue())
    return made


TARGETS: dict[str, Callable[[bytes], None]] = {"wire": messages, "files": files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")  # of Pillow, for files that are nearly valid
    with tempfile.TemporaryDirectory(prefix="sidelight-") as corpus:
        for number, seed in enumerate(seeds(chosen.target)):
            (Path(corpus) / str(number)).write_bytes(seed)
        flags = [f"-max_total_time={chosen.seconds}", "-max_len=4096", "-timeout=20", "-rss_limit_mb=4096"]
        atheris.Setup([sys.argv[0], *flags, corpus], TARGETS[chosen.target])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
