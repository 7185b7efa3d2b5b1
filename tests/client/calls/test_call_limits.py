"""Limits of calls: full servers, messages that are too large, and timeouts."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sidelight
import sidelight_server
import torch
from PIL import Image

from support.models.gate import Gate
from support.tolerances import assert_same


def test_a_full_server_reports_when_to_retry(gate: Gate, gated: str, floats: torch.Tensor) -> None:
    gate.shut()
    with sidelight.connect(gated, connect_timeout=10, retry=False) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.attribute, floats)
        assert gate.reached.wait(30)
        with pytest.raises(sidelight.ResourceExhausted, match="max_in_flight 1") as caught:
            client.attribute(floats)
        gate.open()
        assert len(first.result()) == 5
    assert type(caught.value) is sidelight.ResourceExhausted
    assert caught.value.retry_delay_s == 0.25


def test_a_call_that_a_full_server_refused_is_retried_within_its_timeout(
    gate: Gate, gated: str, floats: torch.Tensor
) -> None:
    gate.shut()
    with sidelight.connect(gated, connect_timeout=10) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.attribute, floats)
        assert gate.reached.wait(30)
        with pytest.raises(sidelight.ResourceExhausted):
            client.attribute(floats, timeout=0.6)  # two delays, and no third
        second = pool.submit(client.attribute, floats, timeout=60)
        threading.Timer(0.3, gate.open).start()
        assert len(first.result()) == len(second.result()) == 5


def test_a_batch_over_the_clients_limit_goes_in_parts_and_an_example_over_it_is_refused(
    client: sidelight.Client, address: str, floats: torch.Tensor
) -> None:
    whole = client.attribute(floats)
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=50_000) as narrow:
        answer = narrow.attribute(floats, target=[0, 1, 2, 3, 4])
        assert_same(answer.maps, client.attribute(floats, target=[0, 1, 2, 3, 4]).maps)
        assert_same(narrow.attribute(floats).maps, whole.maps)
        with pytest.raises(sidelight.InvalidArgument, match="target: 4 classes for 5 examples"):
            narrow.attribute(floats, target=[0, 1, 2, 3])
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=10_000) as narrow:
        with pytest.raises(sidelight.exceptions.MessageTooLarge) as caught:
            narrow.attribute(floats[:1])
        assert "the request takes 12" in caught.value.message
        assert "max_message_bytes of this client's connect() is 10000" in caught.value.message


def test_a_batch_over_the_servers_limit_goes_in_parts_and_an_example_over_it_is_refused(
    spec: sidelight_server.ModelSpec, client: sidelight.Client, device: str, floats: torch.Tensor
) -> None:
    for limit in (50_000, 10_000):
        with (
            sidelight_server.serve(spec, device=device, max_message_bytes=limit) as address,
            sidelight.connect(address, connect_timeout=10) as narrow,
        ):
            if limit == 50_000:
                assert_same(narrow.attribute(floats).maps, client.attribute(floats).maps)
                continue
            with pytest.raises(sidelight.exceptions.MessageTooLarge) as caught:
                narrow.attribute(floats[:1])
    assert "max_message_bytes of the server is 10000" in caught.value.message
    assert "--max-message-bytes" in caught.value.message


def test_an_answer_over_the_clients_limit_comes_in_parts(address: str, tmp_path: Path) -> None:
    path = tmp_path / "white.png"  # a small file: five of them make a small request, and 20 kB of maps
    Image.new("RGB", (32, 32), "white").save(path)
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=10_000) as client:
        assert client.attribute([path] * 5).maps.shape == (5, 32, 32)


def test_an_answer_in_parts_is_replayed(address: str, floats: torch.Tensor, tmp_path: Path) -> None:
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=50_000) as narrow:
        narrow.attribute(floats, target=[4, 3, 2, 1, 0]).save(tmp_path / "whole")
        assert sidelight.replay(narrow, tmp_path / "whole", floats).kept


def test_the_size_of_an_answer_follows_the_number_and_the_type_of_its_maps(address: str, tmp_path: Path) -> None:
    path = tmp_path / "white.png"
    Image.new("RGB", (32, 32), "white").save(path)
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=10_000) as client:
        with pytest.raises(sidelight.exceptions.MessageTooLarge, match="the answer's maps take 12288 bytes"):
            client.attribute(path, target=sidelight.TopK(3))
        assert client.attribute(path, target=sidelight.TopK(3), map_dtype="float16").maps.shape == (1, 3, 32, 32)
        assert len(client.attribute([path] * 5, map_dtype="uint8")) == 5


def test_an_answer_over_the_servers_limit_names_side_limit_and_setting(
    spec: sidelight_server.ModelSpec, device: str, tmp_path: Path
) -> None:
    path = tmp_path / "white.png"
    Image.new("RGB", (32, 32), "white").save(path)
    with (
        sidelight_server.serve(spec, device=device, max_message_bytes=10_000) as address,
        sidelight.connect(address, connect_timeout=10) as client,
    ):
        with pytest.raises(sidelight.ResourceExhausted, match="the server's max_message_bytes is 10000") as caught:
            client.attribute([path] * 5)
        assert len(client.attribute(path)) == 1
    assert caught.value.message.startswith("the answer takes 20480 bytes")


def test_a_call_past_its_timeout_ends(gate: Gate, gated: str, floats: torch.Tensor) -> None:
    with sidelight.connect(gated, connect_timeout=10) as client:
        client.info()
        gate.shut()
        with pytest.raises(sidelight.DeadlineExceeded):
            client.attribute(floats, timeout=0.2)
        gate.open()


@pytest.mark.parametrize("timeout", [math.inf, 1e12, 1e9, 3600, 1e6 + 0.123456789], ids=repr)
def test_a_very_long_timeout_is_accepted(client: sidelight.Client, floats: torch.Tensor, timeout: float) -> None:
    assert len(client.attribute(floats, timeout=timeout)) == 5
    assert len(list(client.stream([floats], timeout=timeout))) == 1


@pytest.mark.parametrize("timeout", [0, -1, math.nan, -math.inf], ids=repr)
@pytest.mark.parametrize("way", ["attribute", "stream"])
def test_a_call_with_a_timeout_that_is_not_positive_is_refused(
    client: sidelight.Client, floats: torch.Tensor, timeout: float, way: str
) -> None:
    with pytest.raises(sidelight.InvalidArgument, match=r"timeout: got .* s, expected a positive time"):
        client.attribute(floats, timeout=timeout) if way == "attribute" else list(
            client.stream([floats], timeout=timeout)
        )
