"""Shared memory: the server survives whatever happens to a caller's file."""

import asyncio
import os
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight_server.rpc.shared_memory import to_thread_uncancelled

from support.messages.attribution import (
    INVALID_ARGUMENT,
    NOT_FOUND,
    assert_explains,
    attribute,
    cancel,
    code_of,
    floats,
    linear_maps,
)
from support.messages.conversation import Conversation
from support.messages.regions import DATA_LOSS, SIZE, files_of, into, lying, make, opened, put
from support.servers.running import TIMEOUT_S, Running, gated
from support.tolerances import CLOSED_FORM
from support.waiting import until_no_stream_is_left


def assert_lives(server: Running) -> None:
    """The next good request is answered."""
    with Conversation(server.channel) as stream:
        stream.send(attribute("good", floats(2)))
        (answer,) = stream.finish()
    assert_explains(answer, floats(2))
    server.until_all_permits_are_back()


MISPLACED = {
    "images of an unknown region": ({"images": lying(floats(1), "aa")}, NOT_FOUND, '"a"?'),
    "maps in an unknown region": ({"output": into("aa")}, NOT_FOUND, '"a"?'),
    "images beyond the end": ({"images": lying(floats(1), offset=SIZE - 239)}, INVALID_ARGUMENT, "images.shared"),
    "images before the start": ({"images": lying(floats(1), offset=-1)}, INVALID_ARGUMENT, "images.shared"),
    "maps beyond the end": ({"output": into(offset=SIZE - 79)}, INVALID_ARGUMENT, "output.region"),
    "maps before the start": ({"output": into(offset=-1)}, INVALID_ARGUMENT, "output.region"),
    "maps of a shape": (
        {"output": pb.Output(region=tensor_pb2.SharedTensor(region="a", shape=[1]))},
        INVALID_ARGUMENT,
        "output.region",
    ),
    "huge images": (
        {"images": tensor_pb2.Images(shared=tensor_pb2.SharedTensor(region="a", dtype=4, shape=[2**40, 2**40, 9]))},
        INVALID_ARGUMENT,
        "too large",
    ),
}


@pytest.mark.parametrize(("fields", "code", "fragment"), MISPLACED.values(), ids=MISPLACED)
def test_a_tensor_outside_its_region_fails_before_any_work(
    fields: dict[str, object], code: int, fragment: str, server: Running, folder: Path
) -> None:
    make(folder / "a")
    with Conversation(server.channel) as stream:
        opened(stream, "a")
        stream.send(attribute("bad", floats(1), **fields))
        refused = stream.receive()
        assert (refused.id, code_of(refused)) == ("bad", code)
        assert fragment in refused.failure.message
        stream.send(attribute("next", floats(2)))
        (answer,) = stream.finish()
    assert_explains(answer, floats(2))


def test_a_file_that_is_cut_short_fails_its_batches_alone(server: Running, folder: Path) -> None:
    path, images = make(folder / "a"), floats(3)
    with Conversation(server.channel) as stream:
        opened(stream, "a")
        os.truncate(path, 100)
        stream.send(attribute("read", floats(0), images=lying(images)))
        refused = stream.receive()
        assert (refused.id, code_of(refused)) == ("read", DATA_LOSS)
        assert 'region "a"' in refused.failure.message
        stream.send(attribute("write", images, output=into(offset=4096)))
        refused = stream.receive()
        assert (refused.id, code_of(refused)) == ("write", DATA_LOSS)
        assert path.stat().st_size == 100  # the server did not extend the file
        stream.send(attribute("inline", images))
        (answer,) = stream.finish()
    assert_explains(answer, images)
    assert_lives(server)


def test_a_file_that_is_cut_short_while_its_batch_runs_fails_it(tmp_path: Path, folder: Path, device: str) -> None:
    with (
        gated(tmp_path, device=device, shared_memory=folder) as (gate, server),
        Conversation(server.channel) as stream,
    ):
        path = make(folder / "a")
        opened(stream, "a")
        stream.send(attribute("running", floats(1), output=into()))
        assert gate.reached.wait(TIMEOUT_S)
        os.truncate(path, 79)
        gate.open()
        (answer,) = stream.finish()
        assert code_of(answer) == DATA_LOSS
        assert path.stat().st_size == 79
        assert_lives(server)


CHANGES = {
    "deleted": lambda path: path.unlink(),
    "replaced by a link": lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
    "replaced by a folder": lambda path: (path.unlink(), path.mkdir()),
    "replaced by a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "replaced by another": lambda path: (path.unlink(), make(path, size=1)),
    "grown": lambda path: os.truncate(path, 2 * SIZE),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_registered_region_does_not_depend_on_its_files_name(change: object, server: Running, folder: Path) -> None:
    path, images = make(folder / "a"), floats(3)
    put(path, images)
    with path.open("rb") as held, Conversation(server.channel) as stream:
        opened(stream, "a")
        change(path)
        stream.send(attribute("one", floats(0), images=lying(images), output=into(offset=4096)))
        (answer,) = stream.finish()
        assert answer.result.transport == pb.TRANSPORT_SHARED_MEMORY, answer
        maps = np.frombuffer(os.pread(held.fileno(), 3 * 4 * 5 * 4, 4096), "<f4").reshape(3, 4, 5)
    np.testing.assert_allclose(maps, linear_maps(images), **CLOSED_FORM)
    assert_lives(server)


def test_a_caller_that_disconnects_leaves_no_file_open(tmp_path: Path, folder: Path, device: str) -> None:
    with gated(tmp_path, device=device, shared_memory=folder) as (gate, server):
        path = make(folder / "a")
        for n in range(10):
            gate.shut()
            with grpc.insecure_channel(server.server.addresses[0], [("n", n)]) as channel:
                stream = Conversation(channel)
                opened(stream, "a")
                stream.send(*(attribute(str(k), floats(2), images=lying(floats(2)), output=into()) for k in range(8)))
                assert gate.reached.wait(TIMEOUT_S)
                assert files_of(folder) == 1
            stream.leave()
            gate.open()
            until_no_stream_is_left(server)
            assert files_of(folder) == 0
        assert path.stat().st_size == SIZE
        assert_lives(server)


def test_a_batch_in_a_region_can_be_cancelled(tmp_path: Path, folder: Path, device: str) -> None:
    with (
        gated(tmp_path, device=device, shared_memory=folder) as (gate, server),
        Conversation(server.channel) as stream,
    ):
        make(folder / "a")
        opened(stream, "a")
        stream.send(attribute("one", floats(2), images=lying(floats(2)), output=into()))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(cancel("one"))
        assert code_of(stream.receive()) == 1
        gate.open()
        assert stream.finish() == []
        assert (folder / "a").read_bytes() == bytes(SIZE)


def test_partial_maps_stay_inline(server: Running, folder: Path) -> None:
    make(folder / "a")
    method = pb.Method(smoothgrad=pb.SmoothGradMethod(samples=60))
    with Conversation(server.channel) as stream:
        opened(stream, "a")
        stream.send(attribute("one", floats(1), method=method, output=into(partial=True)))
        *partial, last = stream.finish()
    assert last.result.final
    assert not last.result.maps.data
    assert all(answer.result.maps.data and not answer.result.final for answer in partial)


def test_blocking_work_is_waited_for_however_often_it_is_cancelled() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert go_on.wait(TIMEOUT_S)
        ended.set()

    async def main() -> None:
        working = asyncio.create_task(to_thread_uncancelled(work))
        await asyncio.to_thread(begun.wait, TIMEOUT_S)
        for _ in range(3):
            working.cancel()
            await asyncio.sleep(0)
            assert not working.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await working
        assert ended.is_set()

    asyncio.run(main())


def test_a_region_that_was_never_registered_is_not_found(server: Running) -> None:
    with Conversation(server.channel) as stream:
        stream.send(attribute("one", floats(1), images=lying(floats(1))))
        (answer,) = stream.finish()
    assert code_of(answer) == NOT_FOUND
    assert "there are none" in answer.failure.message
