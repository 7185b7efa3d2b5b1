"""A stream that a test drives message by message."""

import contextlib
import queue

import grpc
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc
from sidelight_server.rpc.streaming.stream import END_TRAILER

from support.servers.running import TIMEOUT_S


class Conversation:
    """A stream that a test drives: it sends and receives when the test calls it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[pb.AttributeStreamRequest | None] = queue.SimpleQueue()
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        self._call = stub.AttributeStream(iter(self._requests.get, None), timeout=TIMEOUT_S)

    def __enter__(self) -> "Conversation":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def send(self, *requests: pb.AttributeStreamRequest) -> None:
        for each in requests:
            self._requests.put(each)

    def receive(self) -> pb.AttributeStreamResponse:
        return next(self._call)

    def finish(self) -> list[pb.AttributeStreamResponse]:
        """End the requests, and return all further responses. The stream must end with OK."""
        self._requests.put(None)
        rest = list(self._call)
        assert self._call.code() is grpc.StatusCode.OK
        return rest

    def end(self) -> tuple[list[pb.AttributeStreamResponse], grpc.StatusCode, str]:
        """Return all further responses until the server ends the stream, the status, and the cause in the trailers."""
        answers: list[pb.AttributeStreamResponse] = []
        with contextlib.suppress(grpc.RpcError):
            answers.extend(self._call)
        self._requests.put(None)
        cause = dict(self._call.trailing_metadata()).get(END_TRAILER, "")
        return answers, self._call.code(), cause

    @property
    def details(self) -> str:
        return self._call.details()

    def leave(self) -> None:
        """Cancel the call without closing the stream first."""
        self._call.cancel()
        self._requests.put(None)
