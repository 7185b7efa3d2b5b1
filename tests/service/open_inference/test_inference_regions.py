"""Shared memory in the Open Inference Protocol."""

import asyncio
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import grpc
import pytest
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.interop.open_inference import inference_pb2 as oip

from support.messages.attribution import ask, floats, maps_of
from support.messages.inference import call, infer_request, parameter, tensor, tensors_of, wanted
from support.messages.inference_requests import PIXELS, files_request, good, infer, packed, png
from support.models import Linear, sized_cnn
from support.servers.running import TIMEOUT_S, Running, gated, serving

Status = grpc.StatusCode


@pytest.fixture
def sharing() -> Iterator[Running]:
    """A server that allows the folder of `multiprocessing.SharedMemory`."""
    settings = Settings(device="cpu", threads=1, shared_memory=Path("/dev/shm"), max_stream_regions=3)
    with serving(Engine([ModelSpec(Linear(), name="linear")], settings), "127.0.0.1:0") as server:
        yield server


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory(create=True, size=64 * 1024)
    yield memory
    memory.close()
    memory.unlink()


def register(channel: grpc.Channel, name: str, memory: SharedMemory, *, offset: int = 0, size: int = 32 * 1024) -> None:
    request = oip.SystemSharedMemoryRegisterRequest(name=name, key=f"/{memory.name}", offset=offset, byte_size=size)
    call(channel, "SystemSharedMemoryRegister", request)


def regions(channel: grpc.Channel) -> list[str]:
    return sorted(call(channel, "SystemSharedMemoryStatus", oip.SystemSharedMemoryStatusRequest()).regions)


def test_images_and_outputs_go_through_regions(sharing: Running, memory: SharedMemory) -> None:
    images = floats(2)
    inline = tensors_of(call(sharing.channel, "ModelInfer", infer_request(images)))
    register(sharing.channel, "in", memory)
    register(sharing.channel, "out", memory, offset=32 * 1024)
    memory.buf[100 : 100 + images.nbytes] = images.tobytes()
    place = {"shared_memory_region": "in", "shared_memory_byte_size": images.nbytes, "shared_memory_offset": 100}
    outputs = [
        wanted("maps", shared_memory_region="out", shared_memory_byte_size=2000),
        "predicted",
        wanted("score", shared_memory_region="out", shared_memory_byte_size=16, shared_memory_offset=8000),
    ]
    request = infer_request(images, outputs=outputs, inputs=[tensor(images, **place)], raw_input_contents=[])
    response = call(sharing.channel, "ModelInfer", request)
    assert [len(each) for each in response.raw_output_contents] == [0, 16, 0]
    assert response.outputs[0].parameters["shared_memory_byte_size"].int64_param == inline["maps"].nbytes
    out = memory.buf[32 * 1024 :]
    assert bytes(out[: inline["maps"].nbytes]) == inline["maps"].tobytes()
    assert bytes(out[8000:8016]) == inline["score"].tobytes()
    assert tensors_of(response)["predicted"].tolist() == inline["predicted"].tolist()
    out.release()


def test_files_come_from_a_region(memory: SharedMemory) -> None:
    settings = Settings(device="cpu", threads=1, shared_memory=Path("/dev/shm"))
    content = packed(png(PIXELS[0]), b"none")
    memory.buf[: len(content)] = content
    with serving(Engine([sized_cnn()], settings), "127.0.0.1:0") as server:
        register(server.channel, "in", memory)
        inline = infer(server, files_request(2, raw_input_contents=[content]))
        request = files_request(2)
        request.inputs[0].parameters["shared_memory_region"].CopyFrom(parameter("in"))
        request.inputs[0].parameters["shared_memory_byte_size"].CopyFrom(parameter(len(content)))
        got = infer(server, request)
        assert got["maps"].tobytes() == inline["maps"].tobytes()
        assert got["failures"].tolist() == inline["failures"].tolist()


def from_region(region: str = "a", *, size: int = 240, offset: int = 0) -> oip.ModelInferRequest:
    place = {"shared_memory_region": region, "shared_memory_byte_size": size, "shared_memory_offset": offset}
    return good(inputs=[tensor(floats(1), **place)], raw_input_contents=[])


OUTSIDE: dict[str, tuple[Callable[[], oip.ModelInferRequest], str]] = {
    "behind the end": (lambda: from_region(offset=32 * 1024 - 239), "do not lie within region"),
    "before the start": (lambda: from_region(offset=-8), "expected none negative"),
    "another size": (lambda: from_region(size=239), "shared_memory_byte_size: 239"),
    "maps behind the end": (
        lambda: good(outputs=[wanted("maps", shared_memory_region="a", shared_memory_offset=32 * 1024)]),
        "do not lie within region",
    ),
    "maps too large": (
        lambda: good(outputs=[wanted("maps", shared_memory_region="a", shared_memory_byte_size=79)]),
        "79, the maps need 80",
    ),
    "scores too large": (
        lambda: good(outputs=[wanted("score", shared_memory_region="a", shared_memory_byte_size=7)]),
        r"score.*: 7, but shape \[1\] of FP64 needs 8 bytes",
    ),
}


@pytest.mark.parametrize(("make", "pattern"), OUTSIDE.values(), ids=OUTSIDE)
def test_a_tensor_outside_its_region_is_refused(
    make: Callable[[], oip.ModelInferRequest], pattern: str, sharing: Running, memory: SharedMemory
) -> None:
    register(sharing.channel, "a", memory)
    with pytest.raises(grpc.RpcError, match=pattern) as caught:
        infer(sharing, make())
    assert caught.value.code() is Status.INVALID_ARGUMENT
    assert infer(sharing, good())


def test_regions_have_limits(sharing: Running, memory: SharedMemory, server: Running) -> None:
    register(sharing.channel, "a", memory)
    for name, size, key, code in (
        ("a", 8, memory.name, Status.INVALID_ARGUMENT),  # is there already
        ("", 8, memory.name, Status.INVALID_ARGUMENT),
        ("b", 0, memory.name, Status.INVALID_ARGUMENT),
        ("b", 2**40, memory.name, Status.RESOURCE_EXHAUSTED),
        ("b", 65 * 1024, memory.name, Status.DATA_LOSS),  # more than the file has
        ("b", 8, "no-such-file", Status.NOT_FOUND),
        ("b", 8, "../shm/" + memory.name, Status.INVALID_ARGUMENT),
    ):
        request = oip.SystemSharedMemoryRegisterRequest(name=name, key=key, byte_size=size)
        with pytest.raises(grpc.RpcError) as caught:
            call(sharing.channel, "SystemSharedMemoryRegister", request)
        assert caught.value.code() is code, (name, size, key)
    for name in ("b", "c"):
        register(sharing.channel, name, memory)
    with pytest.raises(grpc.RpcError, match="max_stream_regions is 3"):
        register(sharing.channel, "d", memory)
    with pytest.raises(grpc.RpcError, match="operator has not allowed") as caught:
        register(server.channel, "a", memory)
    assert caught.value.code() is Status.FAILED_PRECONDITION


def test_a_region_ends_by_unregister(sharing: Running, memory: SharedMemory) -> None:
    for name in ("a", "b", "c"):
        register(sharing.channel, name, memory)
    for name, left in (("b", ["a", "c"]), ("b", ["a", "c"]), ("", [])):
        call(sharing.channel, "SystemSharedMemoryUnregister", oip.SystemSharedMemoryUnregisterRequest(name=name))
        assert regions(sharing.channel) == left
    with pytest.raises(grpc.RpcError, match="not registered"):
        infer(sharing, from_region())


def test_a_region_ends_with_its_connection(sharing: Running, memory: SharedMemory) -> None:
    register(sharing.channel, "mine", memory)
    own = [("grpc.use_local_subchannel_pool", 1)]  # or both channels would share a connection
    with grpc.insecure_channel(sharing.server.addresses[0], options=own) as other:
        register(other, "theirs", memory)
        assert regions(other) == ["theirs"]
        assert regions(sharing.channel) == ["mine"]  # each connection has its own regions
        sharing.run(sharing.server._regions.sweep())
        assert regions(other) == ["theirs"]

    async def until_it_is_gone() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while len(sharing.server._regions._callers) > 1:  # noqa: ASYNC110  (nothing signals it)
                await asyncio.sleep(0.05)

    sharing.run(until_it_is_gone())
    assert regions(sharing.channel) == ["mine"]


def test_a_region_ends_with_its_file(sharing: Running) -> None:
    memory = SharedMemory(create=True, size=32 * 1024)
    register(sharing.channel, "a", memory)
    memory.close()
    memory.unlink()
    sharing.run(sharing.server._regions.sweep())
    assert regions(sharing.channel) == []


def test_a_request_in_flight_keeps_its_region_open(tmp_path: Path, memory: SharedMemory) -> None:
    with gated(tmp_path, device="cpu", shared_memory=Path("/dev/shm")) as (gate, server):
        register(server.channel, "a", memory)
        images = floats(1)
        memory.buf[: images.nbytes] = images.tobytes()
        request = from_region()
        request.outputs.append(
            wanted("maps", shared_memory_region="a", shared_memory_offset=1000, shared_memory_byte_size=80)
        )
        method = server.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=oip.ModelInferRequest.SerializeToString,
            response_deserializer=oip.ModelInferResponse.FromString,
        )
        answer = method.future(request, timeout=TIMEOUT_S)
        assert gate.reached.wait(TIMEOUT_S)
        call(server.channel, "SystemSharedMemoryUnregister", oip.SystemSharedMemoryUnregisterRequest())
        gate.open()
        answer.result()
        ours = maps_of(server.stub.Attribute(ask(images), timeout=TIMEOUT_S))
        assert bytes(memory.buf[1000:1080]) == ours.tobytes()
