"""Recomputation of a saved answer, to compare the two: the public function `replay`."""

import os
from pathlib import Path

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from .._inputs.batch import Images, single_batch
from .._inputs.enums import MapDtype, enum_number
from .._inputs.images import EncodedBatch
from .._inputs.tensors import Array, floats
from .._options import duration
from ..exceptions import InvalidArgument
from ..methods.baselines import given_tensor
from ..results import storage
from ..results.comparison import Replay, compare
from ..results.storage import Record
from .client import Client
from .core import TIMEOUT_S


def replay(
    client: Client,
    saved: str | os.PathLike[str],
    images: Images,
    *,
    baseline: str | os.PathLike[str] | Array | None = None,
    timeout: float = TIMEOUT_S,
) -> Replay:
    """Recompute an answer that `Attribution.save` wrote, and compare the two.

    `saved` is the folder, or the `answer.json` in it. `images` is the batch that the answer explains: the same files,
    byte for byte, or the same arrays. `baseline` is the array that the method was given, or a file of it (None: the
    saved `baseline.npy`). `timeout` is in seconds.

    Raises what `Client.attribute` raises, `UnreadableFile` for a file that cannot be read, and `InvalidArgument` for a
    file with other content, or for images that differ from the saved digests.
    """
    record, batch = storage.load(Path(saved)), EncodedBatch(single_batch(images))
    if len(batch) != len(record.digests):
        raise InvalidArgument(f"images: got {len(batch)}, expected {len(record.digests)}, one for each saved example")
    _check_examples(record, batch)
    answer = client._explain(_request(record, baseline, timeout), batch, timeout_s=timeout)
    return compare(record, answer)


def _check_examples(record: Record, batch: EncodedBatch) -> None:
    """Raise `InvalidArgument` if an example's digest is not the saved one. Answers of older servers have none."""
    saved = record.provenance.example_digests
    for i, (then, now) in enumerate(zip(saved, batch.digests(), strict=False)):
        if then != now:
            name = f' "{record.names[i]}"' if record.names[i] else ""
            raise InvalidArgument(
                f"images: example {i} is not the picture{name} that the answer explains: its SHA-256 is {now}, "
                f"the record has {then}"
            )


def _request(record: Record, baseline: str | os.PathLike[str] | Array | None, timeout: float) -> pb.AttributeRequest:
    """Return the request that produced the answer, without its images."""
    saved = record.provenance
    return pb.AttributeRequest(
        model=saved.model,
        target=saved.target,
        method=_method(record, baseline),
        score=saved.score,
        channels=saved.channels,
        output=pb.Output(map_dtype=enum_number(tensor_pb2.DataType, record.map_dtype, MapDtype, "map_dtype")),
        timeout=duration(timeout),
    )


def _method(record: Record, baseline: str | os.PathLike[str] | Array | None) -> pb.Method:
    """Return the saved method with its baseline array, of which provenance has only the digest."""
    method = pb.Method()
    method.CopyFrom(record.provenance.method)
    tensor = given_tensor(method)
    if tensor is None:
        if baseline is not None:
            raise InvalidArgument("baseline: got an array, but the saved method has no baseline array")
        return method
    if baseline is None or isinstance(baseline, str | os.PathLike):
        baseline = storage.load_array(Path(baseline or record.folder / storage.BASELINE))
    tensor.CopyFrom(floats(baseline, "baseline", expected="the floating array that the method was given"))
    return method
