"""The driver of `benchmarks.speed.inference` in `.venv-inference`: tritonclient's stream. Imports nothing of Sidelight.

Called with an address. Each line of stdin is a round as JSON; the reply is its duration in seconds.
"""

import contextlib
import json
import queue
import sys
import time
from collections.abc import Iterator

import numpy as np
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm

PARAMETERS = {"sidelight_channels": "none"}
TIMEOUT_S = 60.0


def main(address: str) -> None:
    with triton.InferenceServerClient(address) as client:
        for order in sys.stdin:
            asked = json.loads(order)
            images = np.random.default_rng(0).standard_normal(asked["shape"]).astype(np.float32)
            run = through_regions if asked["shared"] else inline
            print(run(client, images, asked["n"], asked["window"]), flush=True)


def inline(client: triton.InferenceServerClient, images: np.ndarray, n: int, window: int) -> float:
    def ask(slot: int) -> None:
        given = triton.InferInput("images", images.shape, "FP32")
        given.set_data_from_numpy(images)
        send(client, given, triton.InferRequestedOutput("maps"), slot)

    def take(result: triton.InferResult, slot: int) -> np.ndarray:
        return result.as_numpy("maps")

    return exchange(client, n, window, ask, take)


def through_regions(client: triton.InferenceServerClient, images: np.ndarray, n: int, window: int) -> float:
    """Each message has a slot. Images are copied into it and maps out of it, as a caller would do."""
    with region(client, "in", images.nbytes * window) as given, region(client, "out", images.nbytes * window) as maps:

        def ask(slot: int) -> None:
            at = slot * images.nbytes
            shm.set_shared_memory_region(given, [images], offset=at)
            image = triton.InferInput("images", images.shape, "FP32")
            image.set_shared_memory("in", images.nbytes, offset=at)
            output = triton.InferRequestedOutput("maps")
            output.set_shared_memory("out", images.nbytes, offset=at)
            send(client, image, output, slot)

        def take(_: triton.InferResult, slot: int) -> np.ndarray:
            return shm.get_contents_as_numpy(maps, np.float32, images.shape, slot * images.nbytes).copy()

        return exchange(client, n, window, ask, take)


def send(client: triton.InferenceServerClient, image: object, output: object, slot: int) -> None:
    client.async_stream_infer("", [image], outputs=[output], request_id=str(slot), parameters=PARAMETERS)


def exchange(client: triton.InferenceServerClient, n: int, window: int, ask: object, take: object) -> float:
    """Send and receive n messages, at most a window of them unanswered; return the seconds."""
    answers: queue.SimpleQueue[tuple[object, object]] = queue.SimpleQueue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    began = time.perf_counter()
    for slot in range(window):
        ask(slot)
    for n_received in range(n):
        result, error = answers.get(timeout=TIMEOUT_S)
        assert error is None, error
        slot = int(result.get_response().id)
        take(result, slot)
        if n_received + window < n:
            ask(slot)
    seconds = time.perf_counter() - began
    client.stop_stream()
    return seconds


@contextlib.contextmanager
def region(client: triton.InferenceServerClient, name: str, n_bytes: int) -> Iterator[object]:
    memory = shm.create_shared_memory_region(name, f"/sidelight_bench_{name}", n_bytes)
    try:
        client.register_system_shared_memory(name, f"/sidelight_bench_{name}", n_bytes)
        yield memory
        client.unregister_system_shared_memory(name)
    finally:
        shm.destroy_shared_memory_region(memory)


if __name__ == "__main__":
    main(sys.argv[1])
