"""A caller that sends HTTP/2 frames itself, and can therefore do what gRPC's own clients cannot."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

TIMEOUT_S = 20.0
ATTRIBUTE = "/sidelight.v1.AttributionService/Attribute"
STREAM = "/sidelight.v1.AttributionService/AttributeStream"
CHECK = "/grpc.health.v1.Health/Check"
INFO = "/sidelight.v1.AttributionService/GetServerInfo"
WATCH = "/grpc.health.v1.Health/Watch"
LARGEST_WINDOW = 2**31 - 1
FRAME = 16_384


@dataclass
class Call:
    """The state of a call."""

    path: str
    n_sent: int = 0
    data: bytearray = field(default_factory=bytearray)
    has_begun: bool = False
    trailers: dict[str, str] = field(default_factory=dict)
    reset: int | None = None  # the error code

    @property
    def is_over(self) -> bool:
        return bool(self.trailers) or self.reset is not None

    @property
    def status(self) -> int | None:
        """gRPC's status; None if the call was reset or has not ended."""
        return int(self.trailers["grpc-status"]) if self.trailers else None


class Caller:
    """One connection. `window`: the bytes of each answer that the server may send before it needs a window update."""

    def __init__(self, address: str, *, window: int = LARGEST_WINDOW) -> None:
        if address.startswith("unix:"):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            self._socket = socket.create_connection((host, int(port)))
        self._h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, validate_outbound_headers=False)
        )
        self._h2.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(LARGEST_WINDOW - 65_535)  # of the whole connection
        self.calls: dict[int, Call] = {}
        self.is_closed = False
        self._is_settled = False
        self._flush()
        self.until(lambda: self._is_settled)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket without GOAWAY."""
        self._socket.close()

    def n_over(self) -> int:
        """Return how many calls have ended, by the frames received so far."""
        self.look()
        return sum(call.is_over for call in self.calls.values())

    @property
    def room(self) -> int:
        """How many more calls the server allows on this connection."""
        return self._h2.remote_settings.max_concurrent_streams - self._h2.open_outbound_streams

    def begin(self, path: str, *metadata: tuple[str, str]) -> int:
        """Begin a call: send only its headers."""
        call = self._begin(path, *metadata)
        self._flush()
        return call

    def begin_and_reset(self, path: str, message: bytes, n_calls: int) -> None:
        """Make calls, as far as flow control allows, and cancel each at once."""
        content = framed(message)
        for _ in range(n_calls):
            if self._h2.outbound_flow_control_window < len(content):
                break
            call = self._begin(path)
            self._h2.send_data(call, content, end_stream=True)
            self._h2.reset_stream(call, 8)
        self._flush()

    def _begin(self, path: str, *metadata: tuple[str, str]) -> int:
        call = self._h2.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
        self._h2.send_headers(call, [*headers, ("te", "trailers"), ("content-type", "application/grpc"), *metadata])
        self.calls[call] = Call(path)
        return call

    def ask(self, path: str, message: bytes, *metadata: tuple[str, str]) -> int:
        """Make a complete call with one message."""
        call = self.begin(path, *metadata)
        assert self.send(call, framed(message)) == len(message) + 5
        self.end(call)
        return call

    def send(self, call: int, content: bytes, *, patience_s: float = TIMEOUT_S) -> int:
        """Send bytes of a call as far as flow control allows within a time; return how many."""
        n_sent, until_s = 0, time.monotonic() + patience_s
        while n_sent < len(content) and not self.calls[call].is_over and not self.is_closed:
            room = min(self._h2.local_flow_control_window(call), FRAME, len(content) - n_sent)
            if room:
                self._h2.send_data(call, content[n_sent : n_sent + room])
                n_sent += room
                self.calls[call].n_sent += room
                self._flush()
            elif not self._receive(until_s - time.monotonic()):
                break
        return n_sent

    def end(self, call: int) -> None:
        """Half-close the call."""
        self._h2.end_stream(call)
        self._flush()

    def reset(self, call: int) -> None:
        """Cancel a call."""
        self._h2.reset_stream(call, 8)
        self._flush()

    def take(self, call: int, n_bytes: int) -> None:
        """Increase an answer's window by a number of bytes."""
        self._h2.increment_flow_control_window(n_bytes, call)
        self._flush()

    def look(self, within_s: float = 0.001) -> None:
        """Process the frames that have arrived or arrive within a moment."""
        while self._receive(within_s):
            pass

    def until(self, reached: Callable[[], bool], *, patience_s: float = TIMEOUT_S) -> None:
        """Process frames until a condition is met."""
        until_s = time.monotonic() + patience_s
        while not reached():
            assert self._receive(until_s - time.monotonic()), "the condition was not met in time"

    def result(self, call: int) -> Call:
        """Wait for the end of a call and return its state."""
        self.until(lambda: self.calls[call].is_over)
        return self.calls[call]

    def _receive(self, within_s: float) -> bool:
        """Wait for frames and process them. Returns False if none arrive in time, or the connection is closed."""
        if within_s <= 0 or self.is_closed:
            return False
        self._socket.settimeout(within_s)
        try:
            received = self._socket.recv(2**20)
        except TimeoutError:
            return False
        except ConnectionError:
            received = b""
        if not received:
            self.is_closed = True
            return False
        try:
            events = self._h2.receive_data(received)
        except h2.exceptions.ProtocolError:  # frames that arrive after the server has closed the connection
            self.is_closed = True
            return False
        for event in events:
            self._take_note(event)
        self._flush()
        return True

    def _take_note(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RemoteSettingsChanged():
                self._is_settled = True
            case h2.events.ResponseReceived():
                self.calls[event.stream_id].has_begun = True
                self._note_trailers(event)
            case h2.events.TrailersReceived():
                self._note_trailers(event)
            case h2.events.DataReceived():
                self.calls[event.stream_id].data += event.data
                self._h2.increment_flow_control_window(event.flow_controlled_length)  # of the connection only
            case h2.events.StreamReset():
                self.calls[event.stream_id].reset = int(event.error_code)
            case h2.events.ConnectionTerminated():
                self.is_closed = True

    def _note_trailers(self, event: h2.events.ResponseReceived | h2.events.TrailersReceived) -> None:
        headers = {_text(name): _text(value) for name, value in event.headers}
        if "grpc-status" in headers:
            self.calls[event.stream_id].trailers = headers

    def _flush(self) -> None:
        self._socket.settimeout(TIMEOUT_S)
        try:
            self._socket.sendall(self._h2.data_to_send())
        except ConnectionError:
            self.is_closed = True


def framed(message: bytes, *, n_bytes: int | None = None) -> bytes:
    """Return a message with gRPC's prefix. `n_bytes` is the length in the prefix, if only a first part follows."""
    return b"\0" + (len(message) if n_bytes is None else n_bytes).to_bytes(4, "big") + message


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode()
