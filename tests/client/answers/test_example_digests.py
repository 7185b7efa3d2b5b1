"""An answer is bound to its input: provenance has the SHA-256 of each example as the server received it."""

import asyncio
import hashlib
import io
import struct
from pathlib import Path

import grpc
import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from PIL import Image
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, tensor_pb2

LITTLE = {"uint8": "B", "float16": "e", "float32": "f", "float64": "d"}


def by_hand(example: np.ndarray) -> str:
    """Return the digest as the schema's comment defines it, with only the standard library."""
    text = f"{example.dtype.name} [{', '.join(map(str, example.shape))}]\n".encode("ascii")
    elements = example.ravel().tolist()
    return hashlib.sha256(text + struct.pack(f"<{len(elements)}{LITTLE[example.dtype.name]}", *elements)).hexdigest()


def file_of(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pixels(n: int, side: int = 40) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, side, side, 3), np.uint8)


@pytest.mark.parametrize("side", [40, 400], ids=["little", "large"])  # hashed at once, or in a thread
def test_pixels_are_hashed_as_the_schema_says(client: sidelight.Client, side: int) -> None:
    batch = pixels(3, side)
    expected = tuple(map(by_hand, batch))
    assert client.attribute(batch).provenance.example_digests == expected
    (answer,) = client.stream([batch])
    assert answer.provenance.example_digests == expected
    assert client.attribute(batch[0]).provenance.example_digests == expected[:1]  # one [H, W, C] is a batch of one


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_hashed_in_the_type_that_they_came_in(client: sidelight.Client, dtype: type) -> None:
    batch = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(dtype)
    assert client.attribute(batch).provenance.example_digests == tuple(map(by_hand, batch))
    assert client.attribute(batch.astype(batch.dtype.newbyteorder(">"))).provenance.example_digests == tuple(
        map(by_hand, batch)
    )


def test_bfloat16_is_hashed_as_its_own_bits(address: str) -> None:
    example = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = example.view(torch.int16).numpy().astype("<i2").tobytes()
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_BFLOAT16, shape=example.shape, data=bits)
    request = pb.AttributeRequest(
        images=tensor_pb2.Images(tensor=tensor),
        target=pb.Target(predicted=pb.PredictedTarget()),
        method=pb.Method(gradient=pb.GradientMethod()),
    )
    with grpc.insecure_channel(address) as channel:
        answer = attribution_pb2_grpc.AttributionServiceStub(channel).Attribute(request)
    expected = hashlib.sha256(b"bfloat16 [3, 32, 32]\n" + bits).hexdigest()
    assert list(answer.result.provenance.example_digests) == [expected]


def test_files_are_hashed_by_their_bytes_those_that_fail_too(client: sidelight.Client, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(file_of(pixels(1)[0], "PNG"))
    files = [path, file_of(pixels(2)[0], "JPEG"), b"no picture"]
    answer = client.attribute(files, on_error="return")
    expected = [hashlib.sha256(each).hexdigest() for each in (path.read_bytes(), *files[1:])]
    assert list(answer.provenance.example_digests) == expected
    assert [each.example for each in answer.failures] == [2]
    assert client.attribute([]).provenance.example_digests == ()


def test_a_batch_sent_in_parts_has_the_digests_of_all_examples(address: str) -> None:
    batch = np.random.default_rng(0).normal(size=(40, 3, 32, 32)).astype(np.float32)  # 492 kB
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=100_000) as client:
        (answer,) = client.stream([batch])
    assert answer.provenance.example_digests == tuple(map(by_hand, batch))


def test_what_travels_through_shared_memory_is_hashed_too(module: torch.nn.Module, tmp_path: Path, device: str) -> None:
    batch = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    spec = sidelight_server.ModelSpec(module, input_size=(3, 32, 32))
    with (
        sidelight_server.serve(spec, device=device, shared_memory=tmp_path) as address,
        sidelight.connect(address, connect_timeout=10, shared_memory=True) as client,
    ):
        answer = client.attribute(batch)
    assert answer.transport == "shared_memory"
    assert answer.provenance.example_digests == tuple(map(by_hand, batch))


def test_maps_that_improve_have_no_digests_before_the_last(client: sidelight.Client) -> None:
    batch = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    method = sidelight.IntegratedGradients(tolerance=1e-6, max_rows=600)
    answers = list(client.stream([batch], method=method, partial=True))
    assert {answer.provenance.example_digests for answer in answers if not answer.final} <= {()}
    assert answers[-1].provenance.example_digests == (by_hand(batch[0]),)


def test_a_call_that_is_cancelled_while_its_examples_are_hashed_ends(address: str) -> None:
    async def run() -> None:
        async with sidelight.aio.connect(address, connect_timeout=10) as client:
            for _ in range(20):
                calls = [asyncio.ensure_future(client.attribute(pixels(4, 300))) for _ in range(4)]
                await asyncio.sleep(0)
                for call in calls[:3]:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
                assert len((await calls[3]).provenance.example_digests) == 4

    asyncio.run(run())
