"""Shared memory: images and maps pass through a caller's file, and what is refused at registration."""

import ctypes
import os
import socket
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight_server import ModelSpec, serve
from sidelight_server.errors import ConfigurationError, PermissionDenied
from sidelight_server.rpc.shared_memory import SharedMemory

from support.messages.attribution import (
    INVALID_ARGUMENT,
    NOT_FOUND,
    assert_explains,
    attribute,
    code_of,
    floats,
    linear_maps,
)
from support.messages.conversation import Conversation
from support.messages.regions import (
    DATA_LOSS,
    FAILED_PRECONDITION,
    RESOURCE_EXHAUSTED,
    SIZE,
    files_of,
    into,
    lying,
    make,
    opened,
    put,
    register,
    take,
)
from support.models import Linear, small_cnn
from support.servers.running import TIMEOUT_S, Running
from support.tolerances import CLOSED_FORM
from support.waiting import until_no_stream_is_left

NOBODY = 65534


def test_images_and_maps_go_through_a_region(server: Running, folder: Path) -> None:
    path, images = make(folder / "a"), floats(4)
    put(path, images, offset=1001)
    with Conversation(server.channel) as stream:
        opened(stream, "a")
        path.rename(folder / "kept")  # the server no longer needs the name
        stream.send(attribute("one", floats(0), images=lying(images, offset=1001), output=into(offset=30_003)))
        (answer,) = stream.finish()
    assert answer.result.transport == pb.TRANSPORT_SHARED_MEMORY
    maps = answer.result.maps
    assert (list(maps.shape), maps.data, maps.dtype) == ([4, 4, 5], b"", tensor_pb2.DATA_TYPE_FLOAT32)
    expected = linear_maps(images)
    found = take(folder / "kept", expected.shape, offset=30_003)
    np.testing.assert_allclose(found, expected, **CLOSED_FORM)
    assert os.stat(folder / "kept").st_size == SIZE


def test_a_batch_with_one_direction_in_a_region_is_reported_as_inline(server: Running, folder: Path) -> None:
    path, images = make(folder / "a"), floats(3)
    put(path, images)
    with Conversation(server.channel) as stream:
        opened(stream, "a")
        stream.send(attribute("in", floats(0), images=lying(images)))
        stream.send(attribute("out", images, output=into(offset=4096)))
        answers = {answer.id: answer for answer in stream.finish()}
    assert_explains(answers["in"], images)
    assert {answer.result.transport for answer in answers.values()} == {pb.TRANSPORT_INLINE}
    assert not answers["out"].result.maps.data
    np.testing.assert_allclose(take(path, (3, 4, 5), offset=4096), linear_maps(images), **CLOSED_FORM)


def test_many_batches_share_two_regions(server: Running, folder: Path) -> None:
    there, back = make(folder / "there"), make(folder / "back")
    batches = [floats(1 + n % 3, seed=n) for n in range(40)]
    with Conversation(server.channel) as stream:
        opened(stream, "there", "back")
        for n, images in enumerate(batches):
            put(there, images, offset=1000 * n)
            stream.send(
                attribute(
                    str(n),
                    floats(0),
                    images=lying(images, "there", offset=1000 * n),
                    output=into("back", offset=1000 * n),
                )
            )
        assert len(stream.finish()) == len(batches)
    for n, images in enumerate(batches):
        found = take(back, (len(images), 4, 5), offset=1000 * n)
        np.testing.assert_allclose(found, linear_maps(images), **CLOSED_FORM)


@pytest.mark.parametrize("dtype", [tensor_pb2.DATA_TYPE_FLOAT16, tensor_pb2.DATA_TYPE_UINT8], ids=["half", "byte"])
def test_maps_are_written_as_they_are_wanted(dtype: int, server: Running, folder: Path) -> None:
    path, images = make(folder / "a"), floats(2)
    with Conversation(server.channel) as stream:
        opened(stream, "a")
        stream.send(attribute("inline", images, output=pb.Output(map_dtype=dtype)))
        stream.send(attribute("shared", images, output=into(offset=100, map_dtype=dtype)))
        answers = {answer.id: answer.result.maps for answer in stream.finish()}
    inline, shared = answers["inline"], answers["shared"]
    assert (shared.dtype, list(shared.shape), list(shared.scales)) == (dtype, list(inline.shape), list(inline.scales))
    assert path.read_bytes()[100 : 100 + len(inline.data)] == inline.data


def test_bfloat16_and_pixels_come_from_a_region_as_they_come_inline(folder: Path, device: str) -> None:
    spec = ModelSpec(small_cnn(), input_size=(3, 32, 32))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    wide = floats(1, shape=(3, 32, 32)).view(np.uint32) >> 16
    halves = wide.astype(np.uint16)
    path = make(folder / "a")
    for array, dtype in ((pixels, tensor_pb2.DATA_TYPE_UINT8), (halves, tensor_pb2.DATA_TYPE_BFLOAT16)):
        put(path, array)
        inline = tensor_pb2.Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())
        shared = tensor_pb2.SharedTensor(region="a", dtype=dtype, shape=array.shape)
        with (
            serve(spec, device=device, shared_memory=folder) as address,
            grpc.insecure_channel(address) as channel,
            Conversation(channel) as stream,
        ):
            opened(stream, "a")
            stream.send(attribute("inline", floats(0), images=tensor_pb2.Images(tensor=inline)))
            first = stream.receive()
            stream.send(attribute("shared", floats(0), images=tensor_pb2.Images(shared=shared)))
            (second,) = stream.finish()
        assert first.result.maps == second.result.maps
        assert not first.result.failures


def test_the_settings_limit_where_regions_lie_and_how_many(server: Running, folder: Path) -> None:
    advertised = server.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=TIMEOUT_S).shared_memory
    assert advertised == pb.SharedMemory(directory=str(folder), max_region_bytes=2**30, max_stream_regions=2)


def test_a_server_does_not_start_without_its_region_folder(tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^shared_memory: .*nowhere"):  # noqa: SIM117
        with serve(Linear(), device=device, shared_memory=tmp_path / "nowhere"):
            pass


def link(path: Path) -> None:
    make(path.with_name("target"))
    path.symlink_to("target")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


def hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SIZE)


FILES = {
    "nothing": (lambda path: None, NOT_FOUND, 'there is no file "a"'),
    "a folder": (Path.mkdir, INVALID_ARGUMENT, "not a regular file"),
    "a link": (link, INVALID_ARGUMENT, "not a regular file"),
    "a FIFO": (os.mkfifo, INVALID_ARGUMENT, "not a regular file"),
    "a socket": (listening, INVALID_ARGUMENT, "not a regular file"),
    "a short file": (lambda path: make(path, size=SIZE - 1), DATA_LOSS, f"{SIZE - 1} bytes"),
    "a file of holes": (hole, FAILED_PRECONDITION, "allocate"),
}


@pytest.mark.parametrize(("make_it", "code", "fragment"), FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_a_region_is_refused(
    make_it: object, code: int, fragment: str, server: Running, folder: Path
) -> None:
    make_it(folder / "a")
    with Conversation(server.channel) as stream:
        stream.send(register("a"))
        refused = stream.receive()
        assert (refused.id, code_of(refused)) == ("region", code)
        assert fragment in refused.failure.message
        stream.send(attribute("next", floats(2)))
        (answer,) = stream.finish()
    assert_explains(answer, floats(2))
    assert files_of(folder) == 0


@pytest.mark.parametrize("name", ["", ".", "..", "x/a", "../a", "/etc/passwd", "a\0b", "é" * 128], ids=repr)
def test_a_name_is_that_of_a_file_in_the_folder(name: str, server: Running, folder: Path) -> None:
    make(folder.parent / "a")
    (folder / "x").mkdir()
    make(folder / "x" / "a")
    with Conversation(server.channel) as stream:
        stream.send(register(name))
        assert code_of(stream.receive()) == INVALID_ARGUMENT
        assert stream.finish() == []


@pytest.mark.parametrize(
    ("size", "code"), [(0, INVALID_ARGUMENT), (-1, INVALID_ARGUMENT), (2**30 + 1, RESOURCE_EXHAUSTED)], ids=str
)
def test_a_size_has_bounds(size: int, code: int, server: Running, folder: Path) -> None:
    make(folder / "a")
    with Conversation(server.channel) as stream:
        stream.send(register("a", size))
        assert code_of(stream.receive()) == code


def test_regions_of_a_stream_are_few_and_have_names_of_their_own(server: Running, folder: Path) -> None:
    for name in "abc":
        make(folder / name)
    with Conversation(server.channel) as stream:
        opened(stream, "a")
        stream.send(register("a"))
        assert code_of(stream.receive()) == INVALID_ARGUMENT
        opened(stream, "b")
        stream.send(register("c"))
        assert code_of(stream.receive()) == RESOURCE_EXHAUSTED
        stream.send(register("c", id_=""))
        assert code_of(stream.receive()) == INVALID_ARGUMENT
        with Conversation(server.channel) as other:  # whose names are its own
            opened(other, "a", "c")
            assert files_of(folder) == 4
            assert other.finish() == []
        assert stream.finish() == []
    until_no_stream_is_left(server)
    assert files_of(folder) == 0


def test_a_file_that_the_server_may_not_open_is_refused(folder: Path) -> None:
    """The thread that opens the file runs as another user here: root may open everything."""
    shared = SharedMemory(folder, max_region_bytes=SIZE, max_stream_regions=1)
    make(folder / "a").chmod(0o400 if os.geteuid() == 0 else 0)
    caught: list[BaseException] = []

    def try_it() -> None:
        if os.geteuid() == 0:
            ctypes.CDLL(None).setfsuid(NOBODY)  # of this thread alone
        try:
            shared.open("a", SIZE)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    shared.close()
    (error,) = caught
    assert isinstance(error, PermissionDenied)
    assert '"a"' in error.message
