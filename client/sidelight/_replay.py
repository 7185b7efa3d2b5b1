"""`replay`: computes a saved answer again and compares the two."""

import os
from pathlib import Path

from sidelight.v1 import attribution_pb2 as pb

from ._client import Client
from ._inputs.batch import Images, single_batch
from ._inputs.enums import map_dtype_number
from ._inputs.images import EncodedBatch
from ._inputs.tensors import Array, floats
from ._options import duration
from .exceptions import InvalidArgument
from .methods.baselines import given_tensor
from .results import storage
from .results.replay import Replay, compare
from .results.storage import Record

TIMEOUT_S = 60.0  # of the second answer


def replay(
    client: Client,
    saved: str | os.PathLike[str],
    images: Images,
    *,
    baseline: str | os.PathLike[str] | Array | None = None,
    timeout: float = TIMEOUT_S,
) -> Replay:
    """Compute an answer that `Attribution.save` wrote again, and compare.

    `saved` is the folder or the `answer.json` in it; `images` are the batch that it explained: the same files, byte for
    byte, or the same arrays. Others are refused as another picture. `baseline` is the array that the method was given,
    or its file (None: the saved `baseline.npy`). `timeout` is in seconds. Raises as `Client.attribute` does;
    `UnreadableFile` for a file that cannot be read, and `InvalidArgument` for one that holds something else, or images
    that are others or not as many.
    """
    record, batch = storage.load(Path(saved)), EncodedBatch(single_batch(images))
    if len(batch) != len(record.digests):
        raise InvalidArgument(f"images: got {len(batch)}, expected {len(record.digests)}, as many as the answer has")
    _check_examples(record, batch)
    answer = client._explain(_request(record, baseline, timeout), batch, timeout_s=timeout)
    return compare(record, answer)


def _check_examples(record: Record, batch: EncodedBatch) -> None:
    """Refuse examples that are not those that were explained, where the record says which these were."""
    saved = record.provenance.example_digests
    for i, (then, now) in enumerate(zip(saved, batch.digests(), strict=False)):
        if then != now:
            told = f' "{record.names[i]}"' if record.names[i] else ""
            raise InvalidArgument(
                f"images: example {i} is another picture than the one{told} that the answer explains: its SHA-256 is "
                f"{now}, the record has {then}"
            )


def _request(record: Record, baseline: str | os.PathLike[str] | Array | None, timeout: float) -> pb.AttributeRequest:
    """Return the message that asked for the answer, without its images."""
    saved = record.provenance
    return pb.AttributeRequest(
        model=saved.model,
        target=saved.target,
        method=_method(record, baseline),
        score=saved.score,
        channels=saved.channels,
        output=pb.Output(map_dtype=map_dtype_number(record.map_dtype)),
        timeout=duration(timeout),
    )


def _method(record: Record, baseline: str | os.PathLike[str] | Array | None) -> pb.Method:
    """Return the method that was asked for, with the array that it was given: provenance has only its digest."""
    method = pb.Method()
    method.CopyFrom(record.provenance.method)
    tensor = given_tensor(method)
    if tensor is None:
        if baseline is not None:
            raise InvalidArgument("baseline: got one, but the answer's method was not given any")
        return method
    if baseline is None or isinstance(baseline, str | os.PathLike):
        baseline = storage.load_array(Path(baseline or record.folder / storage.BASELINE))
    tensor.CopyFrom(floats(baseline, "baseline", expected="the floating array that the method was given"))
    return method
