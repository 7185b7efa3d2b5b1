"""Logs: one line for each event, with any content, as key=value or JSON; a failing output stops nothing."""

import contextlib
import io
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import sidelight
from hypothesis import given
from hypothesis import strategies as st
from sidelight import Gradient
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, tensor_pb2
from sidelight_server.telemetry.logs import (
    EVERY_S,
    MAX_KINDS,
    MAX_TEXT,
    MAX_TRACEBACK,
    TRACEBACK_EVERY_S,
    Event,
    Formatter,
    Handler,
    LogFormat,
    Throttle,
)

from support import ROOT

TIMEOUT_S = 60.0
FACTORY = """
import torch
from sidelight_server import ModelSpec

class Net(torch.nn.Module):
    def forward(self, x):
        if x.flatten()[0] > 100:
            raise RuntimeError('no "such"\\nnumber')
        return 2 + x.mean((2, 3)) * (1 if x.flatten()[0] > -100 else float("nan"))

def spec():
    return ModelSpec(Net(), name='n"e t')
"""


def line(log_format: LogFormat, message: object, *arguments: object, error: BaseException | None = None) -> str:
    about = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("lib", logging.ERROR, "a.py", 1, message, arguments, about)
    return Formatter(log_format).format(record)


def parsed(text: str) -> dict[str, str]:
    """Parse key=value; quoted values are JSON strings."""
    fields, rest = {}, text
    while rest:
        name, _, rest = rest.partition("=")
        if rest.startswith('"'):
            value, end = json.JSONDecoder().raw_decode(rest)
        else:
            end = rest.find(" ") if " " in rest else len(rest)
            value = rest[:end]
        fields[name], rest = value, rest[end + 1 :]
    return fields


@given(st.text(), st.text())
def test_whatever_text_is_in_an_event_comes_back_out_of_its_one_line(text: str, configuration: str) -> None:
    event = Event("failed", message=text, configuration=configuration, rows=3)
    for log_format, read in (("text", parsed), ("json", json.loads)):
        written = line(log_format, event)
        assert len(written.splitlines()) == 1
        fields = read(written)
        assert fields["event"] == "failed"
        assert (fields["message"], fields["configuration"], str(fields["rows"])) == (text, configuration, "3")


def test_both_forms_have_the_same_keys() -> None:
    event = Event("a", model="m", n=1, share=0.25, chosen=True)
    text, as_json = parsed(line("text", event)), json.loads(line("json", event))
    assert list(text) == list(as_json) == ["time", "level", "event", "model", "n", "share", "chosen"]
    assert as_json["chosen"] is True
    assert text["chosen"] == "true"
    assert text["time"] == as_json["time"] or text["time"][:10] == as_json["time"][:10]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_exception_is_in_fields_of_the_one_line(log_format: LogFormat) -> None:
    try:
        raise ValueError('two\nlines and a "quote"')
    except ValueError as error:
        written = line(log_format, Event("unexpected", id="a b"), error=error)
    assert "\n" not in written
    fields = parsed(written) if log_format == "text" else json.loads(written)
    assert fields["error"] == 'ValueError: two\nlines and a "quote"'
    assert "test_logs.py" in fields["traceback"]
    assert fields["id"] == "a b"


def test_log_lines_of_libraries_are_events_too() -> None:
    fields = json.loads(line("json", "%s went\nwrong", "it"))
    assert (fields["event"], fields["logger"], fields["message"]) == ("log", "lib", "it went\nwrong")


def test_an_output_that_cannot_be_written_raises_nothing_in_the_code_that_logs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    handler = Handler(Full())
    log = logging.Logger("full")
    log.addHandler(handler)
    log.info(Event("one"))
    log.info("%d", "no number")
    assert handler.n_lost == 2
    assert capsys.readouterr().err == ""


# The process


@contextlib.contextmanager
def process(folder: Path, *flags: str, stderr: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    (folder / "factory.py").write_text(FACTORY)
    command = [sys.executable, "-m", "sidelight_server", "--model", "python:factory:spec", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("SIDELIGHT_")}
    with subprocess.Popen(
        [*command, "--listen", "unix:s", *flags], cwd=folder, stderr=stderr, text=True, env=environment
    ) as server:
        try:
            yield server
        finally:
            server.kill()


def images(first: float) -> np.ndarray:
    batch = np.zeros((1, 3, 4, 4), np.float32)
    batch[0, 0, 0, 0] = first
    return batch


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_two_lines_frame_the_process_and_each_fault_has_one(tmp_path: Path, log_format: LogFormat) -> None:
    with process(tmp_path, "--log-format", log_format, "--metrics-listen", "127.0.0.1:0") as server:
        with sidelight.connect(f"unix:{tmp_path}/s", connect_timeout=TIMEOUT_S) as client:
            client.attribute(images(0))
            answer = client.attribute(images(101), on_error="return")
            assert answer.failures
            with grpc.insecure_channel(f"unix:{tmp_path}/s") as channel:
                request = pb.AttributeRequest(
                    id='a "b"\nevent=ours',
                    target=pb.Target(predicted=pb.PredictedTarget()),
                    method=Gradient().message(),
                )
                request.images.tensor.CopyFrom(
                    tensor_pb2.Tensor(
                        dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1, 3, 4, 4], data=images(-101).tobytes()
                    )
                )
                stub = attribution_pb2_grpc.AttributionServiceStub(channel)
                assert stub.Attribute(request, timeout=TIMEOUT_S).result.failures
        server.send_signal(signal.SIGTERM)
        assert server.wait(TIMEOUT_S) == 0
        lines = server.stderr.read().splitlines()
    read = parsed if log_format == "text" else json.loads
    events = [read(each) for each in lines]
    assert [each["event"] for each in events] == [
        "loaded",
        "serving",
        "outputs_detected",
        "model_failed",
        "model_failed",
        "stopping",
    ]
    assert events[0]["model"] == 'n"e t'
    assert events[3]["error"] == 'RuntimeError: no "such"\nnumber'
    assert "raise RuntimeError" in events[3]["traceback"]
    assert events[4]["id"] == 'a "b"\nevent=ours'
    assert events[4]["message"] == 'model "n"e t": output or gradient is not finite for example 0'
    assert events[1]["metrics"].startswith("127.0.0.1:")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_process_that_cannot_start_ends_with_one_line(tmp_path: Path, log_format: LogFormat) -> None:
    with process(tmp_path, "--log-format", log_format, "--weights", "absent.pt") as server:
        assert server.wait(TIMEOUT_S) == 2
        (line,) = server.stderr.read().splitlines()
    if log_format == "json":
        event = json.loads(line)
        assert event["event"] == "cannot_start"
        line = event["message"]
    assert line.removeprefix("sidelight-server: ") == "weights: absent.pt does not exist"


def test_metrics_are_served_by_default(tmp_path: Path) -> None:
    with process(tmp_path) as server:
        server.stderr.readline()
        (metrics,) = [word for word in shlex.split(server.stderr.readline()) if word.startswith("metrics=")]
        where = metrics.removeprefix("metrics=")
        if where == "127.0.0.1:9464":
            with urllib.request.urlopen(f"http://{where}/metrics", timeout=TIMEOUT_S) as answer:
                assert b"sidelight_model_info" in answer.read()
        else:  # another program on this machine has the port
            assert where == "none: 127.0.0.1:9464: Address already in use"


def test_a_named_port_that_is_taken_is_a_warning_and_the_server_serves(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        process(tmp_path, "--metrics-listen", f"127.0.0.1:{taken.getsockname()[1]}") as server,
    ):
        events = [parsed(server.stderr.readline()) for _ in range(3)]
    assert [each["event"] for each in events] == ["loaded", "metrics_off", "serving"]


@pytest.mark.parametrize(("name", "log_format"), [("full", "text"), ("gone", "json")])
def test_a_full_disk_or_a_closed_pipe_fails_no_request(name: str, log_format: LogFormat, tmp_path: Path) -> None:
    if name == "full":
        stderr = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stderr = os.pipe()
        os.close(reader)
    with process(tmp_path, "--log-format", log_format, stderr=stderr) as server:
        os.close(stderr)
        with sidelight.connect(f"unix:{tmp_path}/s", connect_timeout=TIMEOUT_S) as client:
            for _ in range(3):
                assert client.attribute(images(101), on_error="return").failures  # each of which has a line
                assert not client.attribute(images(0)).failures
        server.send_signal(signal.SIGTERM)
        assert server.wait(TIMEOUT_S) == 0


def raised(text: str) -> ValueError:
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def test_a_kind_has_a_line_a_second_and_a_traceback_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    throttle = Throttle(lambda: now_s)

    def log(event: str = "a", error: Exception | None = None, **fields: object) -> dict[str, object] | None:
        caplog.clear()
        throttle.log(logging.ERROR, Event(event, **fields), error)
        return {**caplog.records[0].msg.fields, "traced": bool(caplog.records[0].exc_info)} if caplog.records else None

    assert log(error=raised("x")) == {"event": "a", "traced": True}
    assert log(error=raised("x")) is None
    assert log(error=raised("y")) is None
    # Another event, another model, another type of error, one example: each is a kind of its own.
    for other in ({"event": "b"}, {"model": "m"}, {"error": KeyError("x")}, {"example": 0}):
        assert log(**other) is not None
        assert log(**other) is None
    now_s = EVERY_S
    logged = log(error=raised("z"))
    assert logged == {"event": "a", "left_out": 2, "error": "ValueError: z", "traced": False}
    now_s = TRACEBACK_EVERY_S + EVERY_S
    assert log(error=raised("z")) == {"event": "a", "traced": True}
    assert all(log(event=f"kind {n}") for n in range(2 * MAX_KINDS))
    assert len(throttle._kinds) <= MAX_KINDS


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_line_of_a_huge_error_is_of_bounded_length(log_format: LogFormat) -> None:
    written = line(log_format, Event("unexpected"), error=raised("x" * 10_000_000))
    assert len(written) < 2 * (MAX_TEXT + MAX_TRACEBACK)


def test_faults_of_thousands_of_examples_are_few_lines(tmp_path: Path) -> None:
    n = 4_000
    failing = np.full((n, 3, 4, 4), 101, np.float32)
    with process(tmp_path, "--metrics-listen", "") as server:
        with sidelight.connect(f"unix:{tmp_path}/s", connect_timeout=TIMEOUT_S) as client:
            client.attribute(images(0))  # the model is known to take the shape
            began_s = time.monotonic()
            answer = client.attribute(failing, on_error="return", timeout=110)
            took_s = time.monotonic() - began_s
        assert len(answer.failures) == n
        server.send_signal(signal.SIGTERM)
        assert server.wait(TIMEOUT_S) == 0
        lines = [each for each in server.stderr.read().splitlines() if "event=model_failed" in each]
    assert 1 <= len(lines) <= 1 + took_s / EVERY_S
    assert sum(map(len, lines)) < (1 + took_s / TRACEBACK_EVERY_S) * 2 * MAX_TRACEBACK + len(lines) * 1_000


def test_the_page_has_every_event() -> None:
    page = (ROOT / "docs" / "reference" / "observability.md").read_text(encoding="utf-8")
    source = "".join(each.read_text(encoding="utf-8") for each in (ROOT / "server").rglob("*.py"))
    events = set(re.findall(r'Event\(\s*"(\w+)"', source))
    assert len(events) > 15
    assert {event for event in events if f"`{event}`" not in page} == set()
    assert not re.search(r"\blog\.(info|warning|error|critical)\((?!Event|loaded_event)", re.sub(r"\(\s+", "(", source))
