"""A server on a linear model."""

from collections.abc import Iterator

import grpc
import pytest
import sidelight_server

from support.models import Linear


@pytest.fixture(scope="module")
def linear(device: str) -> Iterator[grpc.Channel]:
    """A server whose maps have a closed form."""
    with (
        sidelight_server.serve(Linear(), class_names=None, device=device) as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield channel
