"""`Batch`: images with their own target, served classes and id."""

import dataclasses
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..exceptions import InvalidArgument
from .targets import Choice, Target
from .tensors import Array, TorchTensor
from .validation import text

MAX_ID_BYTES = 100  # below the schema's limit of 128: a batch that is sent in parts gets a suffix for each part

Picture = str | os.PathLike[str] | bytes | Image.Image
Images = Picture | Array | TorchTensor | Sequence[Picture | Array | TorchTensor]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The images of one request with their own options. `attribute` and `stream` accept it in place of images.

    `images`: as for `Client.attribute`. `target` overrides the target of the call; None uses that of the call.
    `served_classes`: the class that your model server predicted for each example, by index or label. If the Sidelight
    server predicts another class, `Prediction.is_mismatch` is True. `id` is returned as `answer.id` and appears in the
    server's log: at most 100 bytes of UTF-8, and unique among a stream's unanswered batches. If it is None, the client
    generates one: the batch's position on a stream, a random UUID in a single call.
    """

    images: Images
    target: Target = None
    served_classes: Sequence[Choice] | None = None
    id: str | None = None


def single_batch(images: Images | Batch, served_classes: Sequence[Choice] | None = None) -> Batch:
    """Return the batch of a single call, with an id. Its served classes, if any, override those of the call."""
    batch = images if isinstance(images, Batch) else Batch(images)
    return dataclasses.replace(
        batch,
        served_classes=served_classes if batch.served_classes is None else batch.served_classes,
        id=uuid.uuid4().hex if batch.id is None else batch.id,
    )


def batch_id(value: object) -> str:
    """Return a batch's id. `InvalidArgument` if it is empty, too long or not a string."""
    id_ = text(value, "id")
    if not 0 < (n_bytes := len(id_.encode())) <= MAX_ID_BYTES:
        raise InvalidArgument(f"id: got {n_bytes} bytes, expected 1 to {MAX_ID_BYTES}")
    return id_
