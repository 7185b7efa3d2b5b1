"""The same mistake raises the same type everywhere: in a call, a stream, `connect`, async code and the command line."""

import asyncio
import inspect
import math
import pickle
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sidelight
import sidelight_server

from support.models import small_cnn

IMAGES = np.zeros((1, 3, 32, 32), np.float32)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with sidelight_server.serve(sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32))) as address:
        yield address


def call(address: str, images: Any, **options: Any) -> None:
    with sidelight.connect(address, connect_timeout=10) as client:
        client.attribute(images, **options)


def stream(address: str, images: Any, **options: Any) -> None:
    with sidelight.connect(address, connect_timeout=10) as client:
        for _ in client.stream([images], **options):
            pass


def call_async(address: str, images: Any, **options: Any) -> None:
    async def run() -> None:
        async with sidelight.aio.connect(address, connect_timeout=10) as client:
            await client.attribute(images, **options)

    asyncio.run(run())


def stream_async(address: str, images: Any, **options: Any) -> None:
    async def batches() -> AsyncIterator[Any]:
        yield images

    async def run() -> None:
        async with sidelight.aio.connect(address, connect_timeout=10) as client:
            async for _ in client.stream(batches(), **options):
                pass

    asyncio.run(run())


DOORS = pytest.mark.parametrize("ask", [call, stream, call_async, stream_async], ids=lambda ask: ask.__name__)

WRONG: dict[str, list[object]] = {
    "timeout": ["60", None, 0, -1.0, math.nan, True],
    "model": [3, b"small"],
    "target": [object(), 1.5],
    "method": ["gradient", sidelight.Gradient],
    "score": ["logits", 1],
    "channels": ["max", None],
    "map_dtype": ["float64", np.float32],
    "probabilities": ["no", 1],
    "on_error": ["ignore", None],
    "metadata": [5, "ab", {"a": "b"}, ["ab"], [("A", "b")], [("a b", "c")], [("a", 1)], [("a-bin", "c")], [("a", "ü")]],
}


@DOORS
@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_option_is_an_invalid_argument_that_names_it(
    address: str, ask: Callable[..., None], option: str
) -> None:
    for value in WRONG[option]:
        with pytest.raises(sidelight.InvalidArgument, match=f"^{option}: got "):
            ask(address, IMAGES, **{option: value})


@DOORS
def test_images_that_are_none_are_an_invalid_argument(address: str, ask: Callable[..., None]) -> None:
    for images in (None, 5, np.zeros((2, 2), np.float32), [object()], np.zeros((3, 4, 4), complex)):
        with pytest.raises(sidelight.InvalidArgument, match=r"^images: got "):
            ask(address, images)


@pytest.mark.parametrize("connect", [sidelight.connect, sidelight.aio.connect])
@pytest.mark.parametrize(
    "options",
    [
        {"connect_timeout": "10"},
        {"connect_timeout": -1},
        {"connect_timeout": None},
        {"max_message_bytes": 1e6},
        {"max_message_bytes": 0},
        {"tls": 5},
        {"tls": sidelight.TLS(key="only.pem"), "address": "localhost:1"},
        {"token": 5},
        {"token": "with spaces"},
        {"token": "secret", "address": "example.org:1"},
        {"address": "nowhere"},
        {"address": 50051},
        {"address": []},
    ],
    ids=repr,
)
def test_connect_raises_invalid_argument_for_invalid_options(
    connect: Callable[..., Any], options: dict[str, Any]
) -> None:
    with pytest.raises(sidelight.InvalidArgument, match=r"^(connect_timeout|max_message_bytes|tls|token|address): "):
        connect(**({"address": "unix:/nowhere/absent"} | options))


@pytest.mark.parametrize("timeout", ["600", 0, None])
def test_a_reload_takes_a_positive_time(address: str, timeout: Any) -> None:
    with sidelight.connect(address, connect_timeout=10) as client, pytest.raises(ValueError, match="timeout: got "):
        client.reload(timeout=timeout)


def test_the_images_alone_are_positional() -> None:
    with sidelight.connect("unix:/nowhere/absent") as client:
        for method in (client.attribute, client.stream):
            with pytest.raises(
                TypeError, match=rf"{method.__name__}\(\) takes only the images by position, got 'small'"
            ):
                method(IMAGES, "small")  # type: ignore[operator]
    asynchronous = sidelight.aio.connect("unix:/nowhere/absent")
    assert inspect.iscoroutinefunction(asynchronous.attribute)
    with pytest.raises(TypeError, match="pass every option by name, as in model="):
        asyncio.run(asynchronous.attribute(IMAGES, "small"))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="pass every option by name, as in model="):
        asynchronous.stream(IMAGES, "small")  # type: ignore[call-arg]


@pytest.mark.parametrize("window", [0, -3, 1.5, "8"])
def test_a_window_counts_examples(address: str, window: Any) -> None:
    with pytest.raises(sidelight.InvalidArgument, match="window: got "):
        stream(address, IMAGES, window=window)


def test_an_invalid_argument_is_also_a_value_error() -> None:
    assert issubclass(sidelight.InvalidArgument, ValueError)
    assert issubclass(sidelight.InvalidArgument, sidelight.SidelightError)


@DOORS
def test_another_grpc_server_is_reported_as_such(ask: Callable[..., None], tmp_path: Path) -> None:
    server = grpc.server(ThreadPoolExecutor(2))  # another project's: it has no methods
    server.add_insecure_port(f"unix:{tmp_path}/other")
    server.start()
    try:
        with pytest.raises(sidelight.exceptions.Unimplemented, match="is it a Sidelight server"):
            ask(f"unix:{tmp_path}/other", IMAGES)
        for question in (sidelight.Client.info, sidelight.Client.model, sidelight.Client.reload):
            with (
                sidelight.connect(f"unix:{tmp_path}/other", connect_timeout=10) as client,
                pytest.raises(sidelight.exceptions.Unimplemented, match="is it a Sidelight server"),
            ):
                question(client)
    finally:
        server.stop(0).wait()


def check_unreadable(ask: Callable[[], object], path: object, *, field: str) -> None:
    """An unreadable file raises the same type everywhere, which is also Python's own exception."""
    with pytest.raises(sidelight.exceptions.UnreadableFile, match=f"^{field}: cannot read ") as caught:
        ask()
    error = caught.value
    assert isinstance(error, sidelight.InvalidArgument)
    assert isinstance(error, IsADirectoryError if Path(str(path)).is_dir() else FileNotFoundError)
    assert (str(error.filename), str(path) in str(error), error.message) == (str(path), True, str(error))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.filename, again.errno) == (
        type(error),
        str(error),
        error.filename,
        error.errno,
    )


@DOORS
@pytest.mark.parametrize("form", [str, Path])
def test_an_unreadable_picture_raises_the_same_type_everywhere(
    address: str, ask: Callable[..., None], form: Callable[[Path], Any], tmp_path: Path
) -> None:
    for path in (tmp_path / "absent.png", tmp_path):
        check_unreadable(lambda path=path: ask(address, [form(path)]), form(path), field="images")
    with pytest.raises(sidelight.InvalidArgument, match=r"^images: got .*expected a path"):
        ask(address, "a\0b.png")


@pytest.mark.parametrize("connect", [sidelight.connect, sidelight.aio.connect])
def test_files_of_connect_that_cannot_be_read_are_the_same_type(connect: Callable[..., Any], tmp_path: Path) -> None:
    for path in (tmp_path / "absent.pem", tmp_path):
        check_unreadable(lambda path=path: connect("localhost:1", tls=path), path, field="tls")
        check_unreadable(lambda path=path: connect("localhost:1", token=path), path, field="token")
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    with pytest.raises(sidelight.InvalidArgument, match=r"^token: .* holds no text in UTF-8"):
        connect("localhost:1", token=tmp_path / "token")


def test_what_a_replay_cannot_read_is_the_same_type(address: str, tmp_path: Path) -> None:
    with sidelight.connect(address, connect_timeout=10) as client:
        client.attribute(IMAGES).save(tmp_path / "saved")
        absent = tmp_path / "absent"
        check_unreadable(lambda: sidelight.replay(client, absent, IMAGES), absent, field="saved")
        method = sidelight.IntegratedGradients(steps=2, baseline=IMAGES[0])
        client.attribute(IMAGES, method=method).save(tmp_path / "given")
        check_unreadable(
            lambda: sidelight.replay(client, tmp_path / "given", IMAGES, baseline=absent), absent, field="array"
        )


TOKEN_FILES = ["token.txt", "sub/token", "./token", "../token", "~/token", "/tmp/token", "my-token.key", "tls.pem"]
TOKENS = ["secret", "a1b2c3", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.sig/na+ture==", "/3kk+q/8yZw==", "x" * 5000]


@pytest.mark.parametrize("text", TOKEN_FILES)
def test_text_that_is_the_path_of_a_token_s_file_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text is rejected if it looks like a path, or if a file of that name exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "token").write_text("secret")
    with pytest.raises(sidelight.InvalidArgument, match=r"the text is a file.s path; pass pathlib\.Path") as caught:
        sidelight.connect("unix:/nowhere/absent", token=text)
    assert text not in str(caught.value)


def test_the_name_of_a_file_that_is_there_is_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sidelight.connect("unix:/nowhere/absent", token="token").close()
    (tmp_path / "token").write_text("secret")
    with pytest.raises(sidelight.InvalidArgument, match="token: the text is a file's path"):
        sidelight.connect("unix:/nowhere/absent", token="token")
    sidelight.connect("unix:/nowhere/absent", token=tmp_path / "token").close()


@pytest.mark.parametrize("text", TOKENS, ids=lambda text: text[:20])
def test_a_token_that_is_no_path_is_used_as_it_is(text: str) -> None:
    sidelight.connect("unix:/nowhere/absent", token=text).close()
