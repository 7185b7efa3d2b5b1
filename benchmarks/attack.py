"""Attacks: what hostile callers can do to a server with default settings. `python -m benchmarks.attack`.

Each attack runs alone, then all run together, in processes of their own, beside one good streaming and one good unary
caller. The server may have 2 GiB of memory: a control group ends it above that, where one can be made. At last each
attack runs while the server is told to end.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import queue
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.synchronize import Event
from pathlib import Path

import grpc
import numpy as np
import psutil
import sidelight
from PIL import Image
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from .bombs import many_scans
from .fairness import request
from .held import growth, settled, without_reserve
from .hostile import ATTRIBUTE, CHECK, STREAM, Caller, framed
from .measure import Line, report, server
from .nets import SMALL

SECONDS = 120.0
SHARE_ALONE = 0.5  # of them, for each attack alone
MEMORY_LIMIT = 2 * 2**30
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")  # version 1's and 2's
SHARE = 4e-6  # of a map's maximum: the contract for an example beside other neighbors
DRAIN_S = 3.0
END_GOAL_S = DRAIN_S + 2
CHUNKS_GOAL = 4  # that a good call may wait longer at most, than without an attack
GOOD_TIMEOUT_S = 60.0
REST_S = 30.0
WARM_UP_S = 45.0  # of all attacks, after which caches are filled and pools have all their threads
PAUSE_S = 0.1  # between two calls of a good caller, who leaves the device idle for most of the time
LARGE = 62 * 2**20
CALLS = 50  # of one connection at once

Attack = Callable[[str, Event], None]


def spec() -> object:
    """Return the model, for `python:benchmarks.attack:spec`."""
    from .nets import resnet18_small

    without_reserve()
    return resnet18_small()


# What the callers send, each until it is told to stop.


def _unread_answers(address: str, stop: Event) -> None:
    """256 unary calls, as many at once as are let in, that leave their answers unread by a receive window of 0."""
    message = request(_pixels(4), sidelight.Gradient()).SerializeToString()
    while not stop.is_set():
        with contextlib.ExitStack() as stack:
            callers = [stack.enter_context(Caller(address, window=0)) for _ in range(3)]
            for number, caller in enumerate(itertools.islice(itertools.cycle(callers), 256)):
                if caller.room and not stop.is_set():
                    call = caller.begin(ATTRIBUTE, ("number", str(number)))
                    if caller.send(call, framed(message)) == len(message) + 5:  # else it was refused meanwhile
                        caller.end(call)
            stop.wait(20)


def _slow_reader(address: str, stop: Event) -> None:
    """A stream that takes 200 bytes of its answers a second."""
    message = pb.AttributeStreamRequest(attribute=request(_pixels(4), sidelight.Gradient(), "slow"))
    with Caller(address, window=0) as caller:
        call = caller.begin(STREAM)
        caller.send(call, framed(message.SerializeToString()))
        while not stop.wait(1) and not caller.calls[call].is_over:
            caller.take(call, 200)


def _unfinished_messages(address: str, stop: Event) -> None:
    """Twenty messages of 62 MiB of which the last byte never comes: on streams, to `Attribute`, to health."""
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
    message = request(_pixels(1), sidelight.Gradient()).SerializeToString()
    while not stop.is_set():
        with contextlib.suppress(OSError), Caller(address) as caller:
            while not caller.is_closed and not stop.is_set():
                call = caller.begin(ATTRIBUTE)
                caller.send(call, framed(message), patience_s=1)
                if not caller.calls[call].is_over:
                    caller.reset(call)


def _watches(address: str, stop: Event) -> None:
    """Health watches, as many as a connection takes, on many connections."""
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
    _repeat(address, stop, [request(_pixels(1), sidelight.SmoothGrad(samples=9_000))], at_once=300)


def _small_calls(address: str, stop: Event) -> None:
    """500 calls of 64 rows each at once, over ten connections: small enough for the reserve of small requests."""
    _repeat(address, stop, [request(_pixels(1), sidelight.SmoothGrad(samples=64))], at_once=10 * CALLS)


def _waiting_batches(address: str, stop: Event) -> None:
    """Eight streams that each send two batches of 47 MiB behind a long one, all at once."""
    long = request(_pixels(1), sidelight.SmoothGrad(samples=9_000), "long")
    batches = [request(_pixels(4000), sidelight.Gradient(), each) for each in ("first", "second")]
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
    """Batches of 47 MiB, of which few fit at once."""
    _repeat(address, stop, [request(_pixels(4000), sidelight.Gradient())], at_once=30)


def _many_examples(address: str, stop: Event) -> None:
    """Messages that say 65,536 empty files, or 4,096 examples, in few bytes."""
    messages = [
        pb.AttributeRequest(images=_files([b""] * n), target=_predicted(), method=sidelight.Gradient().message())
        for n in (65_536, 4_096)
    ]
    _repeat(address, stop, messages)


def _odd_numbers(address: str, stop: Event) -> None:
    """Shapes, settings and bits that overflow somewhere."""
    flat = io.BytesIO()
    Image.fromarray(np.zeros((1, 65_000), np.uint8)).save(flat, "PNG")
    nan = np.full(3 * SMALL * SMALL, 0x7FC1, np.uint16)
    bfloat16 = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_BFLOAT16, shape=(1, 3, SMALL, SMALL), data=nan.tobytes())
    labels = [pb.ClassChoice(label=str(n)) for n in range(2000)]
    labelled = pb.AttributeRequest(
        images=request(_pixels(2000), sidelight.Gradient()).images,
        target=pb.Target(per_example=pb.PerExampleTarget(classes=labels)),
    )
    messages = [
        pb.AttributeRequest(images=_files([flat.getvalue()]), target=_predicted()),
        pb.AttributeRequest(images=tensor_pb2.Images(tensor=bfloat16), target=_predicted()),
        request(_pixels(4), sidelight.IntegratedGradients(baseline=sidelight.Blurred(sigma=250_000))),
        request(_pixels(4), sidelight.SmoothGrad(noise_level=3.5e38)),
        labelled,
    ]
    _repeat(address, stop, messages)


ATTACKS: Mapping[str, Attack] = {
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


def _pixels(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, SMALL, SMALL, 3), np.uint8)


def _files(files: list[bytes]) -> tensor_pb2.Images:
    return tensor_pb2.Images(encoded=tensor_pb2.EncodedImages(files=files))


def _predicted() -> pb.Target:
    return pb.Target(predicted=pb.PredictedTarget())


def _channel(address: str, number: int = 0) -> grpc.Channel:
    # Options that differ keep channels of one process from sharing a connection.
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1), ("attack", number)]
    return grpc.insecure_channel(address, options)


def _repeat(address: str, stop: Event, messages: list[pb.AttributeRequest], *, at_once: int = 8) -> None:
    """Send messages again and again, so many at once. What comes back is no matter, as long as it is no INTERNAL."""
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


def _patiently(attack: Attack, address: str, stop: Event, is_last: bool) -> None:
    """Attack with what CPU time is left: an attacker's own machine is another one."""
    os.nice(19)
    with contextlib.suppress(Exception) if is_last else contextlib.nullcontext():
        attack(address, stop)


@contextlib.contextmanager
def _attacked(address: str, attacks: Mapping[str, Attack], *, is_last: bool = False) -> Iterator[None]:
    """Run attacks meanwhile, each in a process of its own. If it is the last, the server may end before they do."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    processes = {
        name: context.Process(target=_patiently, args=(attack, address, stop, is_last), daemon=True)
        for name, attack in attacks.items()
    }
    for process in processes.values():
        process.start()
    try:
        yield
        if not is_last and (failed := [name for name, process in processes.items() if process.exitcode]):
            raise RuntimeError(f"attacks that failed themselves: {', '.join(failed)}")
    finally:
        stop.set()
        for process in processes.values():
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()


# The good callers.


class Good:
    """A streaming and a unary caller, how long their calls took, and what was lost or wrong."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._done = threading.Event()
        self.counts: Counter[str] = Counter()
        self.unary_s: list[float] = []
        self.stream_s: list[float] = []
        with sidelight.connect(address) as client:
            self._expected = client.attribute(_pixels(1)).maps

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let both ask meanwhile."""
        self._done.clear()
        threads = [threading.Thread(target=each) for each in (self._unary, self._stream)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            for thread in threads:
                thread.join()

    def _unary(self) -> None:
        with sidelight.connect(self._address) as client:
            while not self._done.wait(PAUSE_S):
                began = time.perf_counter()
                try:
                    self._check(client.attribute(_pixels(1), timeout=GOOD_TIMEOUT_S).maps)
                    self.unary_s.append(time.perf_counter() - began)
                except sidelight.SidelightError as error:
                    self._lost("unary", error)

    def _stream(self) -> None:
        sent: list[float] = []

        def batches() -> Iterator[np.ndarray]:
            while not self._done.wait(PAUSE_S):
                sent.append(time.perf_counter())
                yield _pixels(1)

        with sidelight.connect(self._address) as client:
            try:
                for answer in client.stream(batches(), timeout=GOOD_TIMEOUT_S, on_error="return"):
                    if isinstance(answer, sidelight.Attribution):
                        self._check(answer.maps)
                        self.stream_s.append(time.perf_counter() - sent[answer.index])
                    else:
                        self._lost("stream", answer)
            except sidelight.SidelightError as error:
                self._lost("stream", error)

    def _lost(self, what: str, error: object) -> None:
        self.counts["lost"] += 1
        print(f"lost ({what}): {error!r}", flush=True)

    def _check(self, maps: np.ndarray) -> None:
        near = np.allclose(maps, self._expected, rtol=0, atol=SHARE * float(self._expected.max()))
        self.counts["served" if near else "wrong"] += 1


def _p99(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99)) if seconds else float("inf")


# The server, and what is said of it.


class Limited:
    """A control group of at most so many bytes, if the system lets one be made."""

    def __init__(self, limit_bytes: int) -> None:
        self.path: Path | None = None
        for root in MEMORY_GROUPS:
            path = root / f"sidelight-attack-{os.getpid()}"
            with contextlib.suppress(OSError):
                path.mkdir()
                for name in ("memory.limit_in_bytes", "memory.max"):
                    with contextlib.suppress(OSError):
                        (path / name).write_text(str(limit_bytes))
                        self.path = path
                        return
                path.rmdir()

    def take(self, pid: int) -> None:
        """Bring a process in, and all that it starts from now on."""
        if self.path:
            (self.path / "cgroup.procs").write_text(str(pid))

    def peak(self) -> int:
        """Return the most that was in use, in bytes; 0 where nothing is known."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            with contextlib.suppress(OSError):
                return int((self.path / name).read_text()) if self.path else 0
        return 0

    def close(self) -> None:
        """Remove the group. Its processes must have ended."""
        if self.path:
            with contextlib.suppress(OSError):
                self.path.rmdir()


def run(seconds: float = SECONDS) -> Iterator[Line]:
    """Run all of it: about as many seconds as are said, and a minute or two for the ends."""
    group = Limited(MEMORY_LIMIT)
    try:
        yield from _attacks(seconds, group)
    finally:
        group.close()
    for name, attack in ATTACKS.items():
        yield _end(name, attack)


def _attacks(seconds: float, group: Limited) -> Iterator[Line]:
    with _served() as (address, good_address, pid):
        group.take(pid)
        process = psutil.Process(pid)
        with sidelight.connect(good_address) as client:
            entry = next(each for each in client.info().models[0].warmup if each.chosen)
        chunk_s = entry.rows / entry.rows_per_second
        quiet = Good(good_address)
        with quiet.running():
            time.sleep(10)
        yield _latency("no attack", quiet, quiet, chunk_s)
        with _attacked(address, ATTACKS):
            time.sleep(WARM_UP_S)
        time.sleep(REST_S)
        before = settled(process)
        for name, attack in ATTACKS.items():
            good = Good(good_address)
            with _attacked(address, {name: attack}):
                time.sleep(1)
                with good.running():
                    time.sleep(SHARE_ALONE * seconds / len(ATTACKS))
            yield _latency(name, good, quiet, chunk_s)
        good = Good(good_address)
        with _attacked(address, ATTACKS):
            time.sleep(1)
            with good.running():
                time.sleep((1 - SHARE_ALONE) * seconds)
        yield _latency("all of them together", good, quiet, chunk_s, is_stated=True)
        time.sleep(REST_S)  # callers who were killed are found to be gone
        after = settled(process, before)
        yield growth("over all attacks", before, after)
        yield Line(
            what="memory of the server and its processes at its most",
            figure=group.peak() / 2**20,
            unit="MiB",
            goal=f"≤ {MEMORY_LIMIT >> 20}, and never ended for it",
            met=process.is_running() and group.peak() <= MEMORY_LIMIT,
            detail="a control group's limit" if group.path else "no control group could be made: not limited",
        )


def _latency(name: str, good: Good, quiet: Good, chunk_s: float, *, is_stated: bool = False) -> Line:
    """Return the line of good callers beside an attack; where the time is only stated, any meets the goal."""
    unary_s, stream_s = _p99(good.unary_s), _p99(good.stream_s)
    lost = good.counts["lost"] + good.counts["wrong"]
    goal_s = _p99(quiet.unary_s) + CHUNKS_GOAL * chunk_s
    return Line(
        what=f"p99 of a good unary call beside {name}",
        figure=1e3 * unary_s,
        unit="ms",
        goal="0 lost, 0 wrong" if is_stated else f"≤ {1e3 * goal_s:.0f}, 0 lost, 0 wrong",
        met=not lost and bool(good.counts["served"]) and (is_stated or unary_s <= goal_s),
        detail=f"{good.counts['served']} served, {good.counts['lost']} lost, {good.counts['wrong']} wrong; "
        f"p99 on a stream {1e3 * stream_s:.0f} ms, medians {1e3 * np.median(good.unary_s or [0]):.0f} and "
        f"{1e3 * np.median(good.stream_s or [0]):.0f} ms",
    )


def _end(name: str, attack: Attack) -> Line:
    """Tell a server to end in the middle of an attack, and say how long that took."""
    with _served("--drain-s", str(DRAIN_S)) as (address, _, pid):
        process = psutil.Process(pid)
        with _attacked(address, {name: attack}, is_last=True):
            time.sleep(3)
            children = process.children(recursive=True)
            began = time.perf_counter()
            process.terminate()
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(60)
            took_s = time.perf_counter() - began
        gone, alive = psutil.wait_procs(children, timeout=2)
    return Line(
        what=f"from SIGTERM to the end in the middle of {name}",
        figure=took_s,
        unit="s",
        goal=f"≤ {END_GOAL_S:g}",
        met=took_s <= END_GOAL_S and not alive,
        detail=f"{len(gone)} processes of its own ended with it, {len(alive)} did not",
    )


@contextlib.contextmanager
def _served(*flags: str) -> Iterator[tuple[str, str, int]]:
    """Run a server; give the address of the attackers, that of good callers, who must be others to it, and its id."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (
        tempfile.TemporaryDirectory(prefix="sidelight-") as folder,
        server(
            "python:benchmarks.attack:spec", "--listen", f"unix:{folder}/good", *flags, address=f"127.0.0.1:{port}"
        ) as (address, pid),
    ):
        yield address, f"unix:{folder}/good", pid


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    sys.exit(report(run(parser.parse_args().seconds)))
