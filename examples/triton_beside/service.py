"""A service that has Triton classify images and Sidelight explain them: `service.py IMAGES TRITON SIDELIGHT`.

Run it where tritonclient and sidelight are installed. It passes the classes that Triton returned to Sidelight, so that
each answer says whether the explained model agrees. It prints how many images were explained, and how many differ.
"""

import sys
import time
from collections.abc import Iterator

import numpy as np
import sidelight
import tritonclient.grpc as triton

NAME = "digits"
BATCH = 64
WITHIN_S = 80.0


def main(path: str, triton_address: str, sidelight_address: str) -> None:
    images = np.load(path)
    n_explained = n_mismatches = 0
    with triton.InferenceServerClient(triton_address) as server, sidelight.connect(sidelight_address) as client:
        wait_for(server)
        for answer in client.stream(served(server, images)):
            n_explained += len(answer)
            n_mismatches += sum(each.is_mismatch for each in answer.predictions)
    print(f"{n_explained} explained, {n_mismatches} of another class than Triton's")


def wait_for(server: triton.InferenceServerClient) -> None:
    """Wait until Triton has loaded the model."""
    until_s = time.monotonic() + WITHIN_S
    while True:
        try:
            if server.is_model_ready(NAME):
                return
        except triton.InferenceServerException:  # nobody listens yet
            pass
        if time.monotonic() > until_s:
            raise TimeoutError(f"Triton did not serve {NAME} within {WITHIN_S:g} s")
        time.sleep(0.2)


def served(server: triton.InferenceServerClient, images: np.ndarray) -> Iterator[sidelight.Batch]:
    """Yield batches with the classes that Triton predicts, and explain those classes."""
    for first in range(0, len(images), BATCH):
        batch = images[first : first + BATCH]
        given = triton.InferInput("images", batch.shape, "FP32")
        given.set_data_from_numpy(batch)
        classes = server.infer(NAME, [given]).as_numpy("scores").argmax(axis=1).tolist()
        yield sidelight.Batch(batch, target=classes, served_classes=classes)


if __name__ == "__main__":
    main(*sys.argv[1:])
