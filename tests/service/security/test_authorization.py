"""Tokens: which calls they allow, changes of tokens during calls, and the limit on a host's streams."""

import asyncio
import contextlib
import logging
import queue
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import sidelight
import sidelight_server
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc
from sidelight_server import ConfigurationError, ModelSpec
from sidelight_server.security.authorization import Callers, Tokens
from typer.testing import CliRunner

from support.certificates import secret, swap
from support.models import small_cnn
from support.models.gate import Gate, Gated
from support.waiting import until_none

Status = grpc.StatusCode

PATIENCE_S = 20.0
IMAGE = np.zeros((1, 3, 32, 32), np.float32)
USER, NEXT, ADMIN = "user-5f2a", "next-77c1", "admin-90d3"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return secret(tmp_path / "tokens", f"# of the gateway\n{USER}\n\n  {NEXT}  \n")


@pytest.fixture
def admins(tmp_path: Path) -> Path:
    return secret(tmp_path / "admins", f"{ADMIN}\n")


@pytest.fixture(params=["unix", "tcp"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"unix:{tmp_path}/socket" if request.param == "unix" else "127.0.0.1:0"


@contextlib.contextmanager
def serving(place: str, *, module: object = None, **settings: object) -> Iterator[str]:
    module = module or ModelSpec(small_cnn(), name="small")
    with sidelight_server.serve(module, listen=(place,), device="cpu", threads=1, **settings) as address:
        yield address


def connect(address: str, token: object = None, **options: object) -> sidelight.Client:
    return sidelight.connect(address, token=token, connect_timeout=PATIENCE_S, **options)


@pytest.mark.parametrize("token", [USER, NEXT, ADMIN])
def test_every_token_of_either_file_may_explain(place: str, tokens: Path, admins: Path, token: str) -> None:
    with serving(place, tokens=tokens, admin_tokens=admins) as address, connect(address, token) as client:
        assert client.attribute(IMAGE).maps.shape == (1, 32, 32)
        assert [answer.error for answer in client.stream([IMAGE, IMAGE])] == [None, None]
        assert client.info().models
        assert client.model().name == "small"


@pytest.mark.parametrize("token", [None, "wrong", USER + "x", USER[:-1], "#"], ids=str)
def test_every_call_is_refused_without_a_token_or_with_a_wrong_one(place: str, tokens: Path, token: str | None) -> None:
    with serving(place, tokens=tokens, allow_reload=True) as address, connect(address, token) as client:
        for call in (
            lambda: client.attribute(IMAGE),
            lambda: list(client.stream([IMAGE])),
            client.info,
            client.model,
            client.reload,
        ):
            with pytest.raises(sidelight.exceptions.Unauthenticated, match=r"^authorization: ") as caught:
                call()
            assert "5f2a" not in str(caught.value)  # neither the wrong token nor the right one


def test_the_asynchronous_client_sends_a_token(place: str, tokens: Path) -> None:
    async def explain(address: str, token: str) -> tuple[int, ...]:
        async with sidelight.aio.connect(address, token=token, connect_timeout=PATIENCE_S) as client:
            assert [each.error async for each in client.stream([IMAGE])] == [None]
            return (await client.attribute(IMAGE)).maps.shape

    with serving(place, tokens=tokens) as address:
        assert asyncio.run(explain(address, USER)) == (1, 32, 32)
        with pytest.raises(sidelight.exceptions.Unauthenticated):
            asyncio.run(explain(address, "wrong"))


RELOADS = {
    "admin": (ADMIN, True, True, None),
    "user": (USER, True, True, sidelight.exceptions.PermissionDenied),
    "none": (None, True, True, sidelight.exceptions.Unauthenticated),
    "wrong": ("wrong", True, True, sidelight.exceptions.Unauthenticated),
    "user, and nobody is admin": (USER, True, False, sidelight.exceptions.PermissionDenied),
    "admin, and users need no token": (ADMIN, False, True, None),
    "none, and users need no token": (None, False, True, sidelight.exceptions.Unauthenticated),
    "no tokens at all": (None, False, False, None),
}


@pytest.mark.parametrize("case", RELOADS)
def test_only_callers_with_permission_reload_a_model(case: str, place: str, tokens: Path, admins: Path) -> None:
    token, with_users, with_admins, error = RELOADS[case]
    files = ({"tokens": tokens} if with_users else {}) | ({"admin_tokens": admins} if with_admins else {})
    source = "python:support.models:small_cnn"
    with serving(place, module=source, allow_reload=True, **files) as address, connect(address, token) as client:
        with pytest.raises(error) if error else contextlib.nullcontext():
            client.reload()
        if with_users or token is None:
            return
        assert client.attribute(IMAGE).maps.shape == (1, 32, 32)


def test_an_admin_token_allows_no_more_than_the_settings(place: str, tokens: Path, admins: Path) -> None:
    with (
        serving(place, tokens=tokens, admin_tokens=admins) as address,
        connect(address, ADMIN) as client,
        pytest.raises(sidelight.exceptions.PermissionDenied, match="allow_reload"),
    ):
        client.reload()


def test_health_needs_no_token_and_reflection_does(place: str, tokens: Path) -> None:
    with serving(place, tokens=tokens) as address, grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert health.Check(request, timeout=PATIENCE_S).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(request, timeout=PATIENCE_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = [reflection_pb2.ServerReflectionRequest(list_services="")]
        with pytest.raises(grpc.RpcError) as caught:
            next(reflection.ServerReflectionInfo(iter(asked), timeout=PATIENCE_S))
        assert caught.value.code() is Status.UNAUTHENTICATED
        metadata = (("authorization", f"bearer {USER}"),)
        assert next(reflection.ServerReflectionInfo(iter(asked), timeout=PATIENCE_S, metadata=metadata))


def test_a_method_that_is_not_there_needs_a_token_to_be_reported_as_unimplemented(place: str, tokens: Path) -> None:
    with serving(place, tokens=tokens) as address, grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/sidelight.v1.AttributionService/Nothing")
        for metadata, code in (
            ((), Status.UNAUTHENTICATED),
            ((("authorization", f"Bearer {USER}"),), Status.UNIMPLEMENTED),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=PATIENCE_S, metadata=metadata)
            assert caught.value.code() is code


HEADERS = {
    "another scheme": (("authorization", f"Basic {USER}"),),
    "no scheme": (("authorization", USER),),
    "nothing behind it": (("authorization", "Bearer "),),
    "two": (("authorization", f"Bearer {USER}"), ("authorization", f"Bearer {USER}")),
    "both in one": (("authorization", f"Bearer {USER} {NEXT}"),),
    "another key": (("token", USER),),
}


@pytest.mark.parametrize("metadata", HEADERS.values(), ids=HEADERS)
def test_a_header_without_a_bearer_token_counts_as_no_token(
    tokens: Path, metadata: tuple[tuple[str, str], ...], tmp_path: Path
) -> None:
    with serving(f"unix:{tmp_path}/socket", tokens=tokens) as address, grpc.insecure_channel(address) as channel:
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=PATIENCE_S, metadata=metadata)
        assert caught.value.code() is Status.UNAUTHENTICATED
        assert USER not in caught.value.details()


def test_a_call_is_refused_before_its_message_is_read(place: str, tokens: Path) -> None:
    """Junk that no decoder takes, and a message over the limit: the status names neither."""
    with serving(place, tokens=tokens, max_message_bytes=4096) as address, grpc.insecure_channel(address) as channel:
        for method in ("Attribute", "GetServerInfo"):
            call = channel.unary_unary(f"/sidelight.v1.AttributionService/{method}")
            for junk in (b"\xff" * 100, b"\xff" * 10_000):
                with pytest.raises(grpc.RpcError) as caught:
                    call(junk, timeout=PATIENCE_S)
                assert caught.value.code() is Status.UNAUTHENTICATED
        stream = channel.stream_stream("/sidelight.v1.AttributionService/AttributeStream")
        silent = threading.Event()
        with pytest.raises(grpc.RpcError) as caught:
            next(stream((b"" for _ in iter(silent.wait, True)), timeout=PATIENCE_S))  # it sends nothing
        silent.set()
        assert caught.value.code() is Status.UNAUTHENTICATED


def test_the_deadline_of_a_caller_without_a_token_changes_nothing(place: str, tokens: Path) -> None:
    with serving(place, tokens=tokens) as address, connect(address, "wrong") as client:
        with pytest.raises(sidelight.exceptions.Unauthenticated):
            client.attribute(IMAGE, timeout=1e9)
        with connect(address, USER) as right:
            right.info()
            with pytest.raises(sidelight.DeadlineExceeded):
                right.attribute(IMAGE, timeout=1e-9)
            assert right.attribute(IMAGE).maps.shape == (1, 32, 32)


def test_tokens_change_without_a_restart_and_running_streams_go_on(
    place: str, tokens: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    batches: queue.Queue[np.ndarray | None] = queue.Queue()
    with (
        serving(place, module=Gated(gate), tokens=tokens) as address,
        connect(address, USER) as client,
        caplog.at_level(logging.INFO, "sidelight"),
    ):
        answers = client.stream(until_none(batches), window=1)
        batches.put(IMAGE)
        assert next(answers).error is None
        swap(tokens, b"fresh\n")
        with pytest.raises(sidelight.exceptions.Unauthenticated):
            client.attribute(IMAGE)
        with connect(address, "fresh") as fresh:
            assert fresh.attribute(IMAGE).error is None
        batches.put(IMAGE)
        assert next(answers).error is None
        batches.put(None)
        assert list(answers) == []
    assert len([each for each in caplog.messages if "event=tokens_read" in each]) == 1
    assert "fresh" not in caplog.text.replace(".fresh", "")


@pytest.mark.parametrize("how", ["path", "callable"])
def test_a_client_sends_the_current_token(place: str, tokens: Path, tmp_path: Path, how: str) -> None:
    mine = secret(tmp_path / "mine", f"# mine\n{USER}\nunused\n")
    token = mine if how == "path" else lambda: mine.read_text().split()[2]
    with serving(place, tokens=tokens) as address, connect(address, token) as client:
        assert client.info().models
        swap(tokens, b"fresh\n")
        with pytest.raises(sidelight.exceptions.Unauthenticated):
            client.info()
        swap(mine, b"# mine\nfresh\n")
        assert client.info().models
        assert [answer.error for answer in client.stream([IMAGE])] == [None]


@pytest.mark.parametrize(
    "content", [None, "", "# none\n", "two words\n", "é\n"], ids=["missing", "empty", "comments", "two", "é"]
)
def test_a_broken_file_is_refused_at_first_and_later_leaves_the_old_one(
    content: str | None, tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = Tokens(tokens, setting="tokens")
    tokens.unlink()
    if content is not None:
        secret(tokens, content)
    with pytest.raises(ConfigurationError, match=f"^tokens: .*{tokens}") as caught:
        Tokens(tokens, setting="tokens")
    assert "two words" not in str(caught.value)
    for _ in range(3):
        assert USER in known
    (line,) = caplog.messages
    assert "event=tokens_kept" in line
    assert "two words" not in line
    swap(tokens, b"fresh\n")
    assert "fresh" in known
    assert USER not in known


def test_a_token_file_readable_by_all_users_is_reported_once(tokens: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens.chmod(0o644)
    known = Tokens(tokens, setting="tokens")
    assert USER in known
    assert "wrong" not in known
    (line,) = caplog.messages
    assert f"tokens: {tokens} is open to every user" in line


def test_a_file_that_is_not_there_keeps_the_server_from_starting(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigurationError, match=r"^admin_tokens: cannot read"),
        serving(f"unix:{tmp_path}/socket", admin_tokens=tmp_path / "absent"),
    ):
        pass


@pytest.mark.parametrize(
    "address", ["10.0.0.1:5", "example.org:5", "[2001:db8::1]:5", ["127.0.0.1:5", "10.0.0.1:5"]], ids=str
)
def test_a_token_is_never_sent_to_another_machine_unencrypted(address: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"^token: .* without TLS") as caught:
        sidelight.connect(address, token=USER)
    assert USER not in str(caught.value)
    with sidelight.connect(address, token=USER, tls=True):
        pass


@pytest.mark.parametrize("token", ["", "two words", "é", "line\n", 5, b"bytes"], ids=repr)
def test_connect_refuses_an_invalid_token(token: object) -> None:
    with pytest.raises(ValueError, match=r"^token: ") as caught:
        sidelight.connect("127.0.0.1:5", token=token)
    assert not token or str(token) not in str(caught.value)


def test_what_a_callers_function_raises_is_raised(place: str, tokens: Path) -> None:
    def vault() -> str:
        raise LookupError("the vault is shut")

    with serving(place, tokens=tokens) as address, connect(address, vault) as client:
        with pytest.raises(LookupError, match="vault"):
            client.info()
        with pytest.raises(LookupError, match="vault"):
            client.attribute(IMAGE)
        with pytest.raises(LookupError, match="vault"):
            list(client.stream([IMAGE]))


def test_a_client_does_not_show_its_token(tokens: Path) -> None:
    with sidelight.connect("127.0.0.1:5", token=USER) as client:
        assert USER not in repr(vars(client))


@pytest.mark.parametrize("how", ["variable", "file"])
def test_the_commands_send_a_token(how: str, place: str, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sidelight._cli.app import app

    with serving(place, tokens=tokens) as address:
        asked = ["info", "--address", address, "--connect-timeout", "20"]
        refused = CliRunner().invoke(app, asked)
        assert refused.exit_code == 1
        assert "authorization: missing" in refused.output
        if how == "variable":
            monkeypatch.setenv("SIDELIGHT_TOKEN", USER)
        else:
            asked += ["--token-file", str(tokens)]
        answered = CliRunner().invoke(app, asked)
        assert answered.exit_code == 0
        assert "small" in answered.output
        assert USER not in answered.output


@pytest.mark.parametrize("mode", ["600", "660", "0666", "000"])
def test_a_unix_socket_has_the_mode_that_is_set(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving(f"unix:{path}", socket_mode=mode):
        assert stat.S_IMODE(path.stat().st_mode) == int(mode, 8)
    beside = tmp_path / "beside"
    beside.touch()
    assert stat.S_IMODE(beside.stat().st_mode) != 0  # the process's own umask is as it was


@pytest.mark.parametrize("mode", ["rw", "999", "66", "10660", 660], ids=str)
def test_an_invalid_socket_mode_is_refused(mode: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^socket_mode: got "), serving("unix:/nowhere", socket_mode=mode):
        pass


def test_a_stream_over_the_limit_is_refused_until_another_ends(place: str) -> None:
    with serving(place, max_peer_streams=1) as address, grpc.insecure_channel(address) as channel:
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        done = threading.Event()
        first = stub.AttributeStream((pb.AttributeStreamRequest() for _ in iter(done.wait, True)), timeout=PATIENCE_S)
        first.initial_metadata()
        second = stub.AttributeStream(iter(()), timeout=PATIENCE_S)
        assert second.code() is Status.RESOURCE_EXHAUSTED
        assert "max_peer_streams" in second.details()
        assert ("retry-after-ms", "1000") in [(each.key, each.value) for each in second.trailing_metadata()]
        done.set()
        assert first.code() is Status.OK
        assert stub.AttributeStream(iter(()), timeout=PATIENCE_S).code() is Status.OK


def test_a_clients_stream_waits_for_a_free_stream_and_then_reports_the_limit(place: str) -> None:
    batches: queue.Queue[np.ndarray | None] = queue.Queue()
    with serving(place, max_peer_streams=1) as address, connect(address) as client:
        first = client.stream(until_none(batches), window=1)
        batches.put(IMAGE)
        assert next(first).error is None
        with (
            sidelight.connect(address, connect_timeout=0.5) as hasty,
            pytest.raises(sidelight.ResourceExhausted, match="max_peer_streams"),
        ):
            list(hasty.stream([IMAGE], timeout=0.5))
        answers: list[sidelight.Attribution] = []
        with connect(address) as patient:
            waiting = threading.Thread(target=lambda: answers.extend(patient.stream([IMAGE])))
            waiting.start()
            batches.put(None)
            assert list(first) == []
            waiting.join(PATIENCE_S)
        assert [answer.error for answer in answers] == [None]


class Shown:
    """What a call shows of its caller."""

    def __init__(self, *, token: str = "", subject: str = "", peer: str = "ipv4:10.0.0.1:1") -> None:
        self._token, self._subject, self._peer = token, subject, peer

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self._token}"),) if self._token else ()

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_subject": [self._subject.encode()]} if self._subject else {}

    def peer(self) -> str:
        return self._peer


def test_a_caller_is_a_token_a_certificate_or_a_connection(tokens: Path, tmp_path: Path) -> None:
    shown = Shown(token="one", subject="CN=a")
    other_token, other_subject = Shown(token="two", subject="CN=a"), Shown(token="one", subject="CN=b")
    elsewhere = Shown(token="one", subject="CN=a", peer="ipv4:10.0.0.1:2")
    certificates = {each: tmp_path / each for each in ("tls_certificate", "tls_key", "tls_client_ca")}

    def alike(settings: sidelight_server.Settings) -> list[bool]:
        callers = Callers(settings)
        return [callers.of(shown) == callers.of(each) for each in (other_token, other_subject, elsewhere)]

    assert alike(sidelight_server.Settings(tokens=tokens)) == [False, True, True]
    assert alike(sidelight_server.Settings(**certificates)) == [True, False, True]
    # An unverified token names no caller: anyone could invent as many as they like.
    assert alike(sidelight_server.Settings()) == [True, True, False]
    assert "one" not in Callers(sidelight_server.Settings(tokens=tokens)).of(shown)
