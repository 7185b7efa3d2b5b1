"""The attacks: each repeats until it is stopped."""

import contextlib
import io
import itertools
import queue
import threading
from collections.abc import Callable
from multiprocessing.synchronize import Event

import grpc
import numpy as np
import sidelight
from PIL import Image
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ...support.bombs import many_scans
from ...support.http2_caller import ATTRIBUTE, CHECK, STREAM, Caller, framed
from ...support.nets import SMALL
from ...support.requests import request

Attack = Callable[[str, Event], None]

LARGE = 62 * 2**20
CALLS = 50  # at once on one connection
N_FAST = 40


def _unread_answers(address: str, stop: Event) -> None:
    """256 unary calls, as many at once as the server admits, that read no answers: their receive window is 0."""
    message = request(pixels(4), sidelight.Gradient()).SerializeToString()
    while not stop.is_set():
        with contextlib.ExitStack() as stack:
            callers = [stack.enter_context(Caller(address, window=0)) for _ in range(3)]
            for number, caller in enumerate(itertools.islice(itertools.cycle(callers), 256)):
                if caller.room and not stop.is_set():
                    call = caller.begin(ATTRIBUTE, ("number", str(number)))
                    if caller.send(call, framed(message)) == len(message) + 5:  # otherwise it was refused
                        caller.end(call)
            stop.wait(20)


def _slow_reader(address: str, stop: Event) -> None:
    """A stream that reads 200 bytes of its answers per second."""
    message = pb.AttributeStreamRequest(attribute=request(pixels(4), sidelight.Gradient(), "slow"))
    with Caller(address, window=0) as caller:
        call = caller.begin(STREAM)
        caller.send(call, framed(message.SerializeToString()))
        while not stop.wait(1) and not caller.calls[call].is_over:
            caller.take(call, 200)


def _unfinished_messages(address: str, stop: Event) -> None:
    """Twenty messages of 62 MiB without their last byte: on streams, to `Attribute`, to health."""
    while not stop.is_set():
        with contextlib.ExitStack() as stack:
            for number in range(20):
                caller = stack.enter_context(Caller(address))
                call = caller.begin((CHECK, ATTRIBUTE, STREAM, STREAM)[number % 4])
                content = framed(bytes(LARGE - 1), n_bytes=LARGE)
                if stop.is_set():
                    return
                caller.send(call, content, patience_s=0.5)
            stop.wait(10)


def _resets(address: str, stop: Event) -> None:
    """Calls that are reset as soon as they are made."""
    message = request(pixels(1), sidelight.Gradient()).SerializeToString()
    while not stop.is_set():
        with contextlib.suppress(OSError), Caller(address) as caller:
            while not caller.is_closed and not stop.is_set():
                call = caller.begin(ATTRIBUTE)
                caller.send(call, framed(message), patience_s=1)
                if not caller.calls[call].is_over:
                    caller.reset(call)


def _watches(address: str, stop: Event) -> None:
    """Health watches on many connections, as many as a connection allows."""
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(_channel(address, n)) for n in range(20)]
        calls = [channel.unary_stream("/grpc.health.v1.Health/Watch")(b"") for channel in channels for _ in range(100)]
        stop.wait()
        for call in calls:
            call.cancel()


def _long_scans(address: str, stop: Event) -> None:
    """JPEG files of 3,000 scans."""
    _repeat(address, stop, [pb.AttributeRequest(images=_files([many_scans(6000, 3000)] * 2), target=_predicted())])


def _huge_pictures(address: str, stop: Event) -> None:
    """PNG files of 50 megapixels in 16 bits, in a few hundred kilobytes each."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((7000, 7000), np.uint16)).save(file, "PNG")
    _repeat(address, stop, [pb.AttributeRequest(images=_files([file.getvalue()] * 2), target=_predicted())])


def _broken_files(address: str, stop: Event) -> None:
    """Messages of 4,000 broken files."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(file, "TIFF")
    broken = file.getvalue()[:-5000]
    _repeat(address, stop, [pb.AttributeRequest(images=_files([broken] * 4000), target=_predicted())])


def _long_work(address: str, stop: Event) -> None:
    """300 calls of about 10,000 rows each at once."""
    _repeat(address, stop, [request(pixels(1), sidelight.SmoothGrad(samples=9_000))], at_once=300)


def _small_calls(address: str, stop: Event) -> None:
    """500 calls of 64 rows each at once, over ten connections: small enough for the reserve of small requests."""
    _repeat(address, stop, [request(pixels(1), sidelight.SmoothGrad(samples=64))], at_once=10 * CALLS)


def _waiting_batches(address: str, stop: Event) -> None:
    """Eight concurrent streams that each send two batches of 47 MiB after one that runs long."""
    long = request(pixels(1), sidelight.SmoothGrad(samples=9_000), "long")
    batches = [request(pixels(4000), sidelight.Gradient(), each) for each in ("first", "second")]
    messages = [pb.AttributeStreamRequest(attribute=each) for each in (long, *batches)]
    while not stop.is_set():
        with contextlib.ExitStack() as stack:
            channels = [stack.enter_context(_channel(address, number)) for number in range(4)]
            calls = [channel.stream_stream(STREAM) for channel in channels]
            encoded = [each.SerializeToString() for each in messages]
            running = [calls[number % 4](iter(encoded), timeout=30) for number in range(8)]
            stop.wait(10)
            for call in running:
                call.cancel()


def _large_batches(address: str, stop: Event) -> None:
    """Batches of 47 MiB, of which the server admits few at a time."""
    _repeat(address, stop, [request(pixels(4000), sidelight.Gradient())], at_once=30)


def _many_examples(address: str, stop: Event) -> None:
    """Small messages that claim 65,536 empty files or 4,096 examples."""
    messages = [
        pb.AttributeRequest(images=_files([b""] * n), target=_predicted(), method=sidelight.Gradient().message())
        for n in (65_536, 4_096)
    ]
    _repeat(address, stop, messages)


def _odd_numbers(address: str, stop: Event) -> None:
    """Shapes, settings and bit patterns that may overflow."""
    flat = io.BytesIO()
    Image.fromarray(np.zeros((1, 65_000), np.uint8)).save(flat, "PNG")
    nan = np.full(3 * SMALL * SMALL, 0x7FC1, np.uint16)
    bfloat16 = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_BFLOAT16, shape=(1, 3, SMALL, SMALL), data=nan.tobytes())
    labels = [pb.ClassChoice(label=str(n)) for n in range(2000)]
    labelled = pb.AttributeRequest(
        images=request(pixels(2000), sidelight.Gradient()).images,
        target=pb.Target(per_example=pb.PerExampleTarget(classes=labels)),
    )
    messages = [
        pb.AttributeRequest(images=_files([flat.getvalue()]), target=_predicted()),
        pb.AttributeRequest(images=tensor_pb2.Images(tensor=bfloat16), target=_predicted()),
        request(pixels(4), sidelight.IntegratedGradients(baseline=sidelight.Blurred(sigma=250_000))),
        request(pixels(4), sidelight.SmoothGrad(noise_level=3.5e38)),
        labelled,
    ]
    _repeat(address, stop, messages)


def _fast_streams(address: str, stop: Event) -> None:
    """Forty streams, each on a connection of its own, that send batches of 47 MiB as fast as the server reads them."""
    message = pb.AttributeStreamRequest(attribute=request(pixels(4000), sidelight.Gradient(), "fast"))
    encoded = message.SerializeToString()

    def send(number: int) -> None:
        with _channel(address, number) as channel:
            while not stop.is_set():
                call = channel.stream_stream(STREAM)(iter(lambda: None if stop.is_set() else encoded, None), timeout=30)
                with contextlib.suppress(grpc.RpcError):
                    for _ in call:
                        pass

    threads = [threading.Thread(target=send, args=(number,), daemon=True) for number in range(N_FAST)]
    for thread in threads:
        thread.start()
    stop.wait()


ATTACKS: dict[str, Attack] = {
    "answers left unread": _unread_answers,
    "a reader of 200 bytes a second": _slow_reader,
    "unfinished messages": _unfinished_messages,
    "rapid resets": _resets,
    "watches": _watches,
    "JPEG files of 3,000 scans": _long_scans,
    "pictures of 50 megapixels": _huge_pictures,
    "4,000 broken files": _broken_files,
    "300 calls of 10,000 rows": _long_work,
    "500 small calls": _small_calls,
    "large batches": _large_batches,
    "batches that wait on streams": _waiting_batches,
    "very many examples": _many_examples,
    "numbers that overflow": _odd_numbers,
}
# Runs only if named: with the others it can end a server of 2 GiB, see docs/explanation/security.md.
BY_NAME: dict[str, Attack] = ATTACKS | {"forty fast streams": _fast_streams}


def pixels(n: int) -> np.ndarray:
    """Return n examples."""
    return np.random.default_rng(0).integers(0, 256, (n, SMALL, SMALL, 3), np.uint8)


def _files(files: list[bytes]) -> tensor_pb2.Images:
    return tensor_pb2.Images(encoded=tensor_pb2.EncodedImages(files=files))


def _predicted() -> pb.Target:
    return pb.Target(predicted=pb.PredictedTarget())


def _channel(address: str, number: int = 0) -> grpc.Channel:
    # Channels of one process share a connection unless their options differ.
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1), ("attack", number)]
    return grpc.insecure_channel(address, options)


def _repeat(address: str, stop: Event, messages: list[pb.AttributeRequest], *, at_once: int = 8) -> None:
    """Send messages repeatedly, `at_once` of them at a time. Any answer is accepted; INTERNAL is printed."""
    encoded = itertools.cycle([each.SerializeToString() for each in messages])
    ended: queue.SimpleQueue[grpc.Future] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(_channel(address, number)) for number in range(-(-at_once // CALLS))]
        calls = itertools.cycle([channel.unary_unary(ATTRIBUTE) for channel in channels])
        running = set()

        def send() -> None:
            future = next(calls).future(next(encoded), timeout=60)
            running.add(future)
            future.add_done_callback(ended.put)

        for _ in range(at_once):
            send()
        while not stop.is_set():
            with contextlib.suppress(queue.Empty):
                future = ended.get(timeout=0.1)
                running.discard(future)
                if future.code() is grpc.StatusCode.INTERNAL:
                    print(f"INTERNAL: {future.details()}", flush=True)
                stop.wait(0.02)
                send()
        for future in running:
            future.cancel()
