"""A model that waits, and a check that no thread remains."""

from collections.abc import Iterator

import pytest
import sidelight
import sidelight_server

from support.messages.batches import assert_ended, client_threads
from support.models.gate import Gate, Gated


@pytest.fixture
def gated(gate: Gate, device: str) -> Iterator[sidelight.Client]:
    """A client of a server whose model waits at the gate, one row at a time."""
    with (
        sidelight_server.serve(Gated(gate), device=device, max_chunk_rows=1, drain_s=0) as address,
        sidelight.connect(address, connect_timeout=10) as client,
    ):
        client.info()
        yield client
        gate.open()


@pytest.fixture
def no_thread_stays(client: sidelight.Client) -> Iterator[None]:
    """Fail if a thread that was started in the test does not end."""
    client.info()
    before = client_threads()
    yield
    assert_ended(client_threads() - before)
