"""A server whose model waits, for the tests of calls."""

from collections.abc import Iterator

import pytest
import sidelight_server

from support.models.gate import Gate, Gated


@pytest.fixture
def gated(gate: Gate, device: str) -> Iterator[str]:
    """The address of a server whose model waits at the gate."""
    spec = sidelight_server.ModelSpec(Gated(gate), input_size=(3, 32, 32))
    with sidelight_server.serve(spec, device=device, max_in_flight=1, drain_s=0) as address:
        yield address
        gate.open()
