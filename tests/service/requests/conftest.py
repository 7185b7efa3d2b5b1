"""Servers that the tests of requests share."""

from collections.abc import Iterator

import grpc
import pytest
import sidelight_server

from support.messages.checked_server import Service, ask, floats, pixels
from support.models import Linear


@pytest.fixture(scope="module")
def small(address: str) -> Iterator[Service]:
    """The small CNN with labels, [3, 32, 32]."""
    with grpc.insecure_channel(address) as channel:
        yield Service.at(channel, ask(pixels(2, 32, 32, 3), id="good"))


@pytest.fixture(scope="module")
def bare(device: str) -> Iterator[Service]:
    """A model without an input size or labels."""
    with (
        sidelight_server.serve(Linear(shape=(3, 4, 5)), device=device, name="bare") as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield Service.at(channel, ask(floats(2, 3, 4, 5)))
