"""Decoding of files in a decoder process against decoding in the calling process."""

import asyncio
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
from sidelight_server.engine.preparation.decoder_pool import DecoderPool
from sidelight_server.inputs.decode_worker import Order
from sidelight_server.inputs.decoding import decode
from sidelight_server.inputs.preprocessing import Preprocessing

from ..support.measure import Line, in_turns

PREPROCESSING = Preprocessing(3, 224, 224, (0.0,) * 3, (1.0,) * 3, 256, "bilinear")
ORDER = Order(PREPROCESSING, max_pixels=50_000_000, max_s=60.0)
SIZES = {(224, 224): 1000, (480, 640): 300, (3000, 4000): 15}  # and the number of rounds, each of one file
GOAL_MS, GOAL_SHARE = 1.0, 0.05  # the larger of both counts


def run() -> list[Line]:
    """Decode JPEG files of three sizes both ways, one file after the other."""
    return list(_measured())


def _measured() -> Iterator[Line]:
    pool, loop = DecoderPool(1), asyncio.new_event_loop()
    try:
        for (height, width), rounds in SIZES.items():
            file = _jpeg(height, width)

            def work(file: bytes = file) -> None:
                loop.run_until_complete(pool.fit([file], ORDER))

            def call(file: bytes = file) -> None:
                PREPROCESSING.fit(decode(file, channels=3, max_pixels=ORDER.max_pixels))

            seconds = in_turns({"worker": work, "call": call}, rounds=rounds)
            # The fastest round is the one that other processes disturbed least.
            worker_ms, call_ms = (1000 * min(each) for each in seconds.values())
            cost_ms = worker_ms - call_ms
            what = f"a JPEG of {width} × {height} decoded and resized in a worker, beyond the call in one process"
            detail = f"{worker_ms:.2f} ms and {call_ms:.2f} ms a file"
            goal_ms = max(GOAL_MS, GOAL_SHARE * call_ms)
            yield Line(what, cost_ms, "ms", f"< {goal_ms:.2g} ms", cost_ms < goal_ms, detail)
    finally:
        loop.close()
        pool.close()


def _jpeg(height: int, width: int) -> bytes:
    """Return a JPEG of a smooth picture with some noise, which compresses like a photograph."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(smooth + random.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
