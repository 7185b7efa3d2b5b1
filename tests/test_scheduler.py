"""The ring: fair between requests, whole chunks of one key, nothing of the cancelled."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from sidelight_server.scheduler import Ring


@dataclass
class Asked:
    """A request of so many rows."""

    name: str
    pending: int
    key: Hashable = "k"
    cancelled: bool = False
    n_taken: int = field(default=0, init=False)

    def take(self) -> str:
        assert self.pending, "take is called only while rows are pending"
        self.pending -= 1
        self.n_taken += 1
        return self.name


def ring_of(*requests: Asked) -> Ring[str]:
    ring: Ring[str] = Ring()
    for request in requests:
        ring.add(request)
    return ring


def test_a_chunk_takes_one_row_from_each_request_in_turn() -> None:
    ring = ring_of(Asked("a", 300), Asked("b", 2), Asked("c", 1))
    assert ring.take_chunk(4) == ["a", "b", "c", "a"]
    assert ring.take_chunk(4) == ["b", "a", "a", "a"]


def test_an_idle_ring_gives_nothing() -> None:
    ring: Ring[str] = Ring()
    assert ring.take_chunk(8) == []
    ring.add(Asked("empty", 0))
    assert len(ring) == 0


def test_a_chunk_is_never_held_back_to_fill_up() -> None:
    assert ring_of(Asked("a", 1)).take_chunk(8) == ["a"]


def test_a_newcomer_joins_the_tail() -> None:
    ring = ring_of(Asked("a", 9), Asked("b", 9))
    assert ring.take_chunk(1) == ["a"]
    ring.add(Asked("c", 1))
    assert ring.take_chunk(3) == ["b", "a", "c"]


def test_a_chunk_has_rows_of_one_key_and_the_others_come_next() -> None:
    ring = ring_of(Asked("a", 5), Asked("x", 2, key="other"), Asked("b", 1), Asked("y", 1, key="other"))
    assert ring.take_chunk(3) == ["a", "b", "a"]
    assert ring.take_chunk(3) == ["x", "y", "x"]
    assert ring.take_chunk(3) == ["a", "a", "a"]


def test_a_cancelled_request_frees_its_rows() -> None:
    gone = Asked("gone", 300)
    ring = ring_of(gone, Asked("a", 2))
    assert ring.take_chunk(2) == ["gone", "a"]
    gone.cancelled = True
    assert ring.take_chunk(8) == ["a"]
    assert (len(ring), gone.n_taken) == (0, 1)


requests = st.lists(st.tuples(st.integers(1, 30), st.sampled_from("kl"), st.booleans()), min_size=1, max_size=12)


@given(requests, st.integers(1, 8))
def test_every_row_runs_exactly_once_unless_cancelled(made: list[tuple[int, str, bool]], limit: int) -> None:
    asked = [Asked(str(i), n, key, cancelled) for i, (n, key, cancelled) in enumerate(made)]
    ring = ring_of(*asked)
    while chunk := ring.take_chunk(limit):
        assert len(chunk) <= limit
        assert len({asked[int(name)].key for name in chunk}) == 1
    assert len(ring) == 0
    for request, (n, _, cancelled) in zip(asked, made, strict=True):
        assert request.n_taken == (0 if cancelled else n)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.sampled_from("klm")), max_size=20),
    st.sampled_from("klm"),
    st.integers(1, 8),
)
def test_a_row_waits_for_its_round_and_one_chunk_of_each_other_key(
    made: list[tuple[int, str]], key: str, limit: int
) -> None:
    """However many rows its neighbours brought: ⌈active requests ÷ chunk rows⌉ chunks, plus one for each other key."""
    ring = ring_of(*(Asked(str(i), n, other) for i, (n, other) in enumerate(made)))
    newcomer = Asked("new", 1, key)
    ring.add(newcomer)
    others = {other for _, other in made} - {key}
    by_key = [sum(other == each for _, other in made) for each in others]
    alike = sum(other == key for _, other in made) + 1
    # Each key's round takes ⌈its requests ÷ limit⌉ chunks, and no more than that before the newcomer's turn.
    bound = -(-alike // limit) + sum(-(-n // limit) for n in by_key)
    waited = 1
    while "new" not in ring.take_chunk(limit):
        waited += 1
    assert waited <= bound
    assert bound <= -(-(len(made) + 1) // limit) + len(others)
