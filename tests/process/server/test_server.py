"""The life cycle of a server process: it starts or reports why not in one line, it drains, and nothing remains."""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc
from sidelight_server import serve
from sidelight_server.__main__ import main

from support.messages.attribution import ask, assert_explains, attribute, floats
from support.messages.conversation import Conversation
from support.models import Linear
from support.models.factories import MARK, ask_net, write_files
from support.servers.processes import LOCAL, await_line, start, started
from support.servers.running import TIMEOUT_S, running

NET = ["--model", "python:factories:net", "--input-size", "3,4,4", "--device", "cpu"]


def weights(name: str) -> list[str]:
    return [*NET, "--weights", name, *LOCAL]


def listen(*addresses: str) -> list[str]:
    return [*NET, *(word for address in addresses for word in ("--listen", address))]


REFUSALS = {
    "no model": ([], ("model: not set", "--model python:mine:resnet", "python:package.module:factory")),
    "another kind of source": (["--model", "keras:net.h5"], ('model: got "keras:net.h5"', "python:")),
    "no factory named": (["--model", "python:factories"], ('model: got "python:factories"', ":factory")),
    "unknown module": (["--model", "python:nowhere:net"], ('model: cannot import "nowhere"', "ModuleNotFoundError")),
    "module that imports what does not exist": (
        ["--model", "python:absent_import:net"],
        ('model: cannot import "absent_import"', "nothing_of_this_name"),
    ),
    "module that is no python": (["--model", "python:no_python:net"], ('cannot import "no_python"', "SyntaxError")),
    "module that exits": (["--model", "python:script:net"], ('cannot import "script"', "SystemExit")),
    "missing factory": (["--model", "python:factories:gone"], ('"factories" has no factory "gone"',)),
    "factory that cannot be called": (["--model", "python:factories:number"], ('has no factory "number"',)),
    "factory that raises": (
        ["--model", "python:factories:sad"],
        ("model: python:factories:sad raised LookupError: no weights in three lines",),
    ),
    "factory that exits": (["--model", "python:factories:leaving"], ("model: ", "leaving raised SystemExit")),
    "factory of something else": (
        ["--model", "python:factories:five"],
        ("model: ", "five returned int", "torch.nn.Module or a ModelSpec"),
    ),
    "model of another input": (
        ["--model", "python:factories:other_size", "--input-size", "3,4,4"],
        ('model "factories": failed on an input of [2, 3, 4, 4]', "RuntimeError"),
    ),
    "settings that contradict the specification": (
        ["--model", "python:factories:spec", "--input-size", "3,8,8"],
        ("input_size: the settings have (3, 8, 8)", "(3, 4, 4)"),
    ),
    "mean without an input size": (
        ["--model", "python:factories:net", "--mean", "0.5"],
        ("mean: is set", "input_size"),
    ),
    "mean of one channel too few": ([*NET, "--mean", "0.5,0.5"], ("mean: got (0.5, 0.5)", "3 finite numbers")),
    "std of zero": ([*NET, "--std", "1,0,1"], ("std: got (1.0, 0.0, 1.0)", "above 0")),
    "missing weights": (weights("gone.pt"), ("weights: gone.pt does not exist",)),
    "missing safetensors": (weights("gone.safetensors"), ("weights: gone.safetensors does not exist",)),
    "half of the weights": (weights("half.pt"), ("weights: half.pt: ", "zip archive")),
    "half of the safetensors": (weights("half.safetensors"), ("weights: half.safetensors: ", "header")),
    "empty weights": (weights("empty.pt"), ("weights: empty.pt: EOFError",)),
    "empty safetensors": (weights("empty.safetensors"), ("weights: empty.safetensors: ", "deserializing header")),
    "junk": (weights("junk.pt"), ("weights: junk.pt: ",)),
    "weights of another model": (weights("others.pt"), ("weights: others.pt: ", "1.bias", "2.bias")),
    "safetensors of another model": (weights("others.safetensors"), ("weights: others.safetensors: ", "1.bias")),
    "weights that are a list": (weights("list.pt"), ("weights: list.pt: holds list", "state dict")),
    "weights that have no names": (weights("numbered.pt"), ("weights: numbered.pt: ",)),
    "weights in another format": (weights("weights.onnx"), ('weights: weights.onnx: got ".onnx"', ".safetensors")),
    "weights that are a folder": (weights("."), ("weights: .: ",)),
    "fewer labels than classes": (
        [*NET, "--class-names", "two.txt"],
        ('class_names: two.txt: got 2, model "factories" has 5 classes',),
    ),
    "missing labels": ([*NET, "--class-names", "gone.txt"], ("class_names: gone.txt: ", "No such file")),
    "unknown device": ([*NET[:-1], "tpu"], ('device: got "tpu"', "cpu, cuda:N or mps")),
    "all addresses": (listen("0.0.0.0:0"), ("listen: 0.0.0.0:0 is not loopback", "--plaintext")),
    "all addresses of IPv6": (listen("[::]:0"), ("listen: [::]:0 is not loopback", "--plaintext")),
    "an address without a host": (listen(":50051"), ("listen: :50051 is not loopback",)),
    "a name that is not loopback": (listen("example.org:50051"), ("listen: example.org:50051 is not loopback",)),
    "one address of two": (listen("127.0.0.1:0", "10.0.0.1:0"), ("listen: 10.0.0.1:0 is not loopback",)),
    "an address without a port": (listen("127.0.0.1"), ('listen: got "127.0.0.1"', "host:port")),
    "a socket where a file is": (listen("unix:plain"), ("listen: plain exists and is not a socket",)),
    "a socket where a folder is": (listen("unix:."), ("listen: . exists and is not a socket",)),
}


def start_in_vain(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Run the command, which must exit with code 2, and return the one line that it prints."""
    monkeypatch.setattr(sys, "argv", ["sidelight-server", *arguments])
    assert main() == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    # Old releases of grpcio log wake-ups that servers of other tests in this process have missed.
    (line,) = (each for each in captured.err.splitlines() if "logger=asyncio" not in each)
    assert line.startswith("sidelight-server: ")
    return line


@pytest.mark.parametrize(("arguments", "fragments"), REFUSALS.values(), ids=REFUSALS)
def test_a_server_that_cannot_start_reports_why_in_one_line(
    arguments: list[str],
    fragments: tuple[str, ...],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    line = start_in_vain(arguments, monkeypatch, capfd)
    for fragment in fragments:
        assert fragment in line
    assert (here / "plain").read_text() == "precious"


@pytest.mark.parametrize("name", ["malicious.pt", "malicious_pickle.pt"], ids=["archive", "bare pickle"])
def test_code_in_weights_is_refused_and_never_run(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    line = start_in_vain(weights(name), monkeypatch, capfd)
    assert f"weights: {name}: " in line
    assert "never run" in line
    assert "weights_only" not in line  # torch's own message advises to switch the check off
    assert not (here / MARK).exists()


def test_another_program_s_socket_is_refused_and_not_removed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind("datagrams")
        line = start_in_vain(listen("unix:datagrams"), monkeypatch, capfd)
        assert "listen: " in line
        assert "datagrams" in line
        assert Path("datagrams").is_socket()


def test_a_port_that_is_taken_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """gRPC writes the cause to stderr by itself, in a line before ours."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(sys, "argv", ["sidelight-server", *listen(address)])
        assert main() == 2
    stderr = capfd.readouterr().err
    assert "Address already in use" in stderr
    assert stderr.splitlines()[-1].startswith(f"sidelight-server: listen: cannot bind {address}: ")
    assert "Traceback" not in stderr


def test_a_process_serves_on_a_port_and_a_socket_until_it_is_stopped(folder: Path) -> None:
    model = ["--model", "python:factories:spec", "--weights", "good.pt", "--name", "renamed", "--device", "cpu"]
    with started(folder, *model, *LOCAL, "--listen", "unix:here.sock") as (process, addresses):
        port, path = addresses
        assert port.startswith("127.0.0.1:")
        assert int(port.rpartition(":")[2]) > 0
        assert path == "unix:here.sock"
        answers = [ask_net(port).result, ask_net(f"unix:{folder}/here.sock").result]
        assert answers[0].maps == answers[1].maps
        assert answers[0].provenance.model == "renamed"
        with grpc.insecure_channel(port) as channel:
            models = model_pb2_grpc.ModelServiceStub(channel)
            listed = models.GetModel(model_pb2.GetModelRequest(), timeout=TIMEOUT_S).model
        assert list(listed.labels) == ["a", "b", "c", "d", "e"]

        process.send_signal(signal.SIGTERM)
        assert "signal=SIGTERM" in await_line(process, "stopping")
        assert process.stderr.read() == ""  # two lines frame a process
        assert process.wait() == 0
    assert not (folder / "here.sock").exists()

    with serve("python:factories:spec", weights=folder / "good.safetensors", device="cpu") as address:
        assert ask_net(address).result.maps == answers[0].maps


def test_running_work_is_answered_after_sigterm(tmp_path: Path) -> None:
    write_files(tmp_path)
    for pipe in ("reached", "go"):
        os.mkfifo(tmp_path / pipe)
    with started(tmp_path, "--model", "python:factories:Gate", *LOCAL, "--device", "cpu") as (process, (address,)):
        with grpc.insecure_channel(address) as channel:
            stub = attribution_pb2_grpc.AttributionServiceStub(channel)
            call = stub.Attribute.future(ask(floats(1, shape=(3, 4, 4))), timeout=TIMEOUT_S)
            (tmp_path / "reached").open().close()
            process.send_signal(signal.SIGTERM)
            assert "unanswered=1" in await_line(process, "stopping")
            (tmp_path / "go").open("w").close()
            assert list(call.result().result.maps.shape) == [1, 4, 4]
        assert process.wait() == 0
        (line,) = process.stderr.read().splitlines()  # what the first rows showed
        assert "event=outputs_detected" in line


def test_a_killed_server_s_socket_is_taken_over_and_a_live_one_s_is_not(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with started(here, *listen("unix:shared.sock")) as (process, _):
        process.kill()
        process.wait()
    assert (here / "shared.sock").is_socket()
    with started(here, *listen("unix:shared.sock")):
        line = start_in_vain(listen("unix:shared.sock"), monkeypatch, capfd)
        assert "listen: another server answers on shared.sock" in line
        assert not ask_net(f"unix:{here}/shared.sock").result.failures


PROCESS_REFUSALS = {
    "an open address": (listen("0.0.0.0:0"), "listen: 0.0.0.0:0 is not loopback"),
    "a misspelt flag": (
        [*NET, "--weigths", "good.pt"],
        "unrecognized arguments: --weigths good.pt (did you mean --weights?)",
    ),
    "code in weights": (weights("malicious.pt"), "weights: malicious.pt: "),
}


def test_a_process_that_cannot_serve_ends_with_code_2_and_a_line(folder: Path) -> None:
    processes = {name: start(folder, *arguments) for name, (arguments, _) in PROCESS_REFUSALS.items()}
    for name, process in processes.items():
        with process:
            stderr = process.stderr.read()
        assert process.returncode == 2, name
        (line,) = stderr.splitlines()
        assert line.startswith(f"sidelight-server: {PROCESS_REFUSALS[name][1]}")
    assert not (folder / MARK).exists()


def test_plaintext_opens_other_addresses(device: str) -> None:
    with serve(Linear(), listen=("0.0.0.0:0",), plaintext=True, device=device) as address:
        port = address.rpartition(":")[2]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = attribution_pb2_grpc.AttributionServiceStub(channel)
            assert not stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S).result.failures


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::1]:0", "127.9.8.7:0"])
def test_loopback_needs_no_plaintext_setting(address: str, device: str) -> None:
    if "::1" in address and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with serve(Linear(), listen=(address,), device=device) as at, grpc.insecure_channel(at) as channel:
        assert at.rpartition(":")[0] == address.rpartition(":")[0]
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        assert not stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S).result.failures


def test_a_server_that_stops_reports_not_serving_before_it_drains(tmp_path: Path, device: str) -> None:
    with running(Linear(), tmp_path, device=device) as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        watched = health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(drain_s=TIMEOUT_S), server.loop)
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched.cancel()
        stopping.result(TIMEOUT_S)


def test_a_stream_accepts_no_new_batch_while_the_server_drains(tmp_path: Path, device: str) -> None:
    with running(Linear(), tmp_path, device=device) as server, Conversation(server.channel) as stream:
        watched = health_pb2_grpc.HealthStub(server.channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        stream.send(attribute("before", floats(1)))
        assert_explains(stream.receive(), floats(1))
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(drain_s=TIMEOUT_S), server.loop)
        assert next(watched).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched.cancel()
        stream.send(attribute("after", floats(1)))
        try:
            code = stream.receive().failure.code
        except grpc.RpcError as error:
            code = error.code().value[0]
        stream.leave()
        stopping.result(TIMEOUT_S)
        assert code == grpc.StatusCode.UNAVAILABLE.value[0]
