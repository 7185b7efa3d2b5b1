"""Traffic: the batches that the load generator repeats, from files or random."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..._clients.client import Client
from ..._inputs.tensors import Array
from ...exceptions import InvalidArgument
from ...results.attribution import Attribution
from ...results.server_info import ModelInfo
from ..options import Explanation

RANDOM_IMAGES = 32  # distinct ones
_MODES = {1: "L", 3: "RGB"}  # Pillow's mode by number of channels

Shape = tuple[int, int, int]
Sent = list[bytes] | Array  # one batch: files, or an array [N, …]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Batches, and the options of every request."""

    batches: Sequence[Sent]
    model: str | None = None
    explained: Explanation = field(default_factory=dict)  # the client's defaults apply to missing ones
    timeout_s: float = 60.0
    is_streamed: bool = False
    window: int | None = None  # of a stream

    @property
    def kind(self) -> str:
        """The form in which images are sent, as text."""
        batch = self.batches[0]
        return "files" if isinstance(batch, list) else f"{batch.dtype} {' × '.join(map(str, batch.shape[1:]))}"

    def call(self, client: Client, batch: Sent) -> Attribution:
        """Send one batch in a unary call. Raises if the whole batch failed."""
        return client.attribute(batch, **self._options)

    def stream(self, client: Client, batches: Iterable[Sent]) -> Iterator[Attribution]:
        """Send batches on one stream, and yield answers as they arrive, including failed ones."""
        return client.stream(batches, window=self.window, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return self.explained | {"model": self.model, "timeout": self.timeout_s, "on_error": "return"}

    def try_out(self, client: Client) -> Attribution:
        """Send the first batch. Raises its error, which all other batches would also have."""
        if not self.is_streamed:
            answer = self.call(client, self.batches[0])
        else:
            (answer,) = self.stream(client, self.batches[:1])
        if answer.error is not None:
            raise answer.error
        return answer


def batches_of_files(paths: Sequence[Path], batch: int, *, size: Shape | None = None) -> list[Sent]:
    """Return batches that cycle through files: unchanged, or as pixels of a model's input size.

    The `OSError` for a file that is not a picture names it.
    """
    n_batches = math.lcm(len(paths), batch) // batch
    if size is None:
        files = itertools.cycle([_file(path) for path in paths])
        return [list(itertools.islice(files, batch)) for _ in range(n_batches)]
    if size[0] not in _MODES:
        raise InvalidArgument(f"--pixels: the model takes {size[0]} channels, and a picture has 1 or 3")
    pixels = itertools.cycle([_pixels(path, size) for path in paths])
    return [np.stack(list(itertools.islice(pixels, batch))) for _ in range(n_batches)]


def random_batches(batch: int, model: ModelInfo, *, shape: Shape | None = None, seed: int = 0) -> list[Sent]:
    """Return batches of noise: pixels of the model's input size, or floating arrays of a given shape."""
    random = np.random.default_rng(seed)
    n_batches = -(-RANDOM_IMAGES // batch)
    if shape is not None:
        return [random.standard_normal((batch, *shape), np.float32) for _ in range(n_batches)]
    if model.input_size is None:
        raise InvalidArgument(f'--shape: model "{model.name}" has no input size, expected --shape C,H,W or images')
    channels, height, width = model.input_size
    if channels not in _MODES:
        return [random.standard_normal((batch, *model.input_size), np.float32) for _ in range(n_batches)]
    return [random.integers(0, 256, (batch, height, width, channels), np.uint8) for _ in range(n_batches)]


def _file(path: Path) -> bytes:
    with Image.open(path):  # check here: the server would reject every batch with this file
        return path.read_bytes()


def _pixels(path: Path, size: Shape) -> Array:
    channels, height, width = size
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert(_MODES[channels]).resize((width, height)))
    return pixels.reshape(height, width, channels)
