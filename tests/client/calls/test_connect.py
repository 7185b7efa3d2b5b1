"""Where `connect` finds its server: arguments and environment variables."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sidelight
import sidelight_server

from support.certificates import secret
from support.models import small_cnn

CONNECTS = [sidelight.connect, sidelight.aio.connect]
IMAGES = np.zeros((1, 3, 32, 32), np.float32)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIDELIGHT_ADDRESS", "SIDELIGHT_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("connect", CONNECTS)
@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
def test_without_an_address_the_error_says_both_ways(
    connect: Callable[..., Any], value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("SIDELIGHT_ADDRESS", value)
    with pytest.raises(sidelight.InvalidArgument) as caught:
        connect()
    for pattern in ("^address: ", r'connect\("host:port"\)', "set SIDELIGHT_ADDRESS$"):
        assert caught.match(pattern)


@pytest.mark.parametrize("connect", CONNECTS)
def test_the_address_of_the_environment_is_used_where_none_is_given(
    connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIDELIGHT_ADDRESS", "unix:/from/environment,localhost:1")
    assert connect().address == "unix:/from/environment, localhost:1"
    assert connect("unix:/given").address == "unix:/given"


def test_a_call_is_answered_with_address_and_token_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    tokens = secret(tmp_path / "tokens", "right")
    spec = sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32))
    with sidelight_server.serve(spec, device=device, tokens=tokens) as address:
        monkeypatch.setenv("SIDELIGHT_ADDRESS", str(address))
        with sidelight.connect() as client, pytest.raises(sidelight.exceptions.Unauthenticated):
            client.attribute(IMAGES)
        monkeypatch.setenv("SIDELIGHT_TOKEN", "right")
        with sidelight.connect() as client:
            assert len(client.attribute(IMAGES)) == 1

        async def ask() -> int:
            async with sidelight.aio.connect() as client:
                return len(await client.attribute(IMAGES))

        assert asyncio.run(ask()) == 1
        with sidelight.connect(token="wrong") as client, pytest.raises(sidelight.exceptions.Unauthenticated):
            client.attribute(IMAGES)


def test_a_token_of_the_environment_is_not_sent_unencrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDELIGHT_TOKEN", "secret")
    with pytest.raises(sidelight.InvalidArgument, match=r"^token: example\.org:1 is another machine"):
        sidelight.connect("example.org:1")
