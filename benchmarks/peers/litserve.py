"""LitServe with Captum or the plain gradient, over HTTP. Run in `.venv-litserve`: torch, numpy, captum, litserve."""

from pathlib import Path
from typing import Annotated

import litserve
import numpy as np
from fastapi import Body, Response

from .http_body import TYPE, body_of, drive_http, pixels_of
from .rival import arguments
from .saliency import Explained, Pixels, explainer, load

BATCH_TIMEOUT_S = 0.02  # how long the first request of a batch waits for others
REQUEST_TIMEOUT_S = 60.0
PATH = "/predict"


class Explain(litserve.LitAPI):
    """One image per request; LitServe batches them."""

    def __init__(self, folder: Path, *, threads: int, batch: int, input_only: bool) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=BATCH_TIMEOUT_S, api_path=PATH)
        self.folder = folder
        self.threads = threads
        self.input_only = input_only

    def setup(self, device: str) -> None:
        self.explainer = explainer(load(self.folder, threads=self.threads), input_only=self.input_only)

    # With this annotation LitServe passes the raw body on. Otherwise it would parse JSON or a form.
    def decode_request(self, request: Annotated[bytes, Body(media_type=TYPE)]) -> Pixels:
        return pixels_of(request)

    def batch(self, inputs: list[Pixels]) -> Pixels:
        return np.stack(inputs)

    def predict(self, x: Pixels) -> Explained:
        return self.explainer.explain(x if x.ndim == 4 else x[None])

    def unbatch(self, output: Explained) -> list[Explained]:
        return [Explained(*each) for each in zip(*output, strict=True)]

    def encode_response(self, output: Explained) -> Response:
        if output.maps.ndim == 3:  # without batching there is no batch to split
            (output,) = self.unbatch(output)
        return Response(body_of(output.maps, int(output.predicted), float(output.probabilities)))


def main() -> None:
    args = arguments(__doc__)
    if args.role == "drive":
        return drive_http(args, PATH)
    api = Explain(args.folder, threads=args.threads, batch=args.batch, input_only=args.input_only)
    # fast_queue: ZeroMQ, which LitServe recommends for high rates.
    server = litserve.LitServer(
        api,
        accelerator="cpu",
        devices=1,
        workers_per_device=args.workers,
        timeout=REQUEST_TIMEOUT_S,
        fast_queue=True,
    )
    server.run(host="127.0.0.1", port=args.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
