"""Processes for tests: servers, and a process that decodes files so that its memory can be measured."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from support import TESTS

PROGRAM = """
import importlib, resource, sys
from sidelight_server.errors import InvalidArgument
from sidelight_server.inputs.decoding import decode
for name in sys.argv[1:]:
    importlib.import_module(name)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.stdin.read().split():
    try:
        decode(bytes.fromhex(file), channels=3, max_pixels=50_000_000)
    except InvalidArgument as error:
        print(error.message)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""

counts_memory = pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory in KiB, as Linux does")


def refused_apart(files: Iterable[bytes], *imported: str) -> tuple[list[str], int]:
    """Return the errors of the refused files, and by how many KiB memory grew; a warning is an error.

    Modules to be imported first are those whose memory is not the files'.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *imported],
        input=" ".join(file.hex() for file in files),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    *messages, grown_kib = done.stdout.splitlines()
    return messages, int(grown_kib)


FACTORIES = """
import torch
from torch import nn
from sidelight_server import ModelSpec

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))

def spec():
    return ModelSpec(net(), input_size=(3, 4, 4), class_names=["a", "b", "c", "d", "e"], name="specified")

class Gate(nn.Module):
    waits = True  # in its first pass

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        if Gate.waits:
            Gate.waits = False
            open("reached", "w").close()  # pipes, each of which waits for its other end
            open("go").close()
        return self.net(x)

def sad():
    raise LookupError("no weights\\n  in three\\nlines")

def leaving():
    raise SystemExit(0)

number = 5

def five():
    return 5

def other_size():
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 5))
"""


WITHIN_S = 240.0  # for Ray, whose processes take tens of seconds to start
PAUSE_S = 0.05
LOCAL = ["--listen", "127.0.0.1:0"]


def until(is_so: Callable[[], bool], what: str) -> None:
    """Poll another process until a condition holds: it sends no event."""
    ends_s = time.monotonic() + WITHIN_S
    while not is_so():
        assert time.monotonic() < ends_s, f"not within {WITHIN_S:g} s: {what}"
        time.sleep(PAUSE_S)


def ray_environment() -> dict[str, str]:
    """Return the variables of processes that share a Ray: where its models are, and its token."""
    return {
        "PYTHONPATH": str(TESTS),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # 15 by default: on a machine with other work, actors would hardly begin
    }


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("SIDELIGHT_")}
    return subprocess.Popen(
        [sys.executable, "-m", "sidelight_server", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def await_line(process: subprocess.Popen[str], event: str) -> str:
    """Return the next line that a process logs, which must be of an event."""
    line = process.stderr.readline()
    assert f"event={event} " in line, line + process.stderr.read()
    return line


@contextlib.contextmanager
def started(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process that serves, and its addresses."""
    with start(folder, *arguments) as process:
        try:
            await_line(process, "loaded")
            line = await_line(process, "serving")
            (addresses,) = (word for word in line.split() if word.startswith("addresses="))
            yield process, addresses.removeprefix("addresses=").split(",")
        finally:
            process.kill()


@contextlib.contextmanager
def process(model: str, address: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Run a server on a model of `support.models.crashing`."""
    source = f"python:support.models.crashing:{model}"
    command = [sys.executable, "-m", "sidelight_server", "--model", source, "--listen", address]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "SIDELIGHT_THREADS": "1"}
    with subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert any("event=serving" in line for line in server.stderr)
            yield server
        finally:
            server.kill()
