"""The scheduler: fair between requests, chunks of one key, no rows of cancelled requests."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from sidelight_server.engine.scheduler import Scheduler


@dataclass
class Asked:
    """A request with `n` rows."""

    name: str
    pending: int
    key: Hashable = "k"
    cancelled: bool = False
    caller: str = ""
    n_taken: int = field(default=0, init=False)

    def take(self) -> str:
        assert self.pending, "take is called only while rows are pending"
        self.pending -= 1
        self.n_taken += 1
        return self.name


def scheduler_of(*requests: Asked) -> Scheduler[str]:
    scheduler: Scheduler[str] = Scheduler()
    for request in requests:
        scheduler.add(request)
    return scheduler


def test_a_chunk_takes_one_row_from_each_request_in_turn() -> None:
    scheduler = scheduler_of(Asked("a", 300), Asked("b", 2), Asked("c", 1))
    assert scheduler.take_chunk(4) == ["a", "b", "c", "a"]
    assert scheduler.take_chunk(4) == ["b", "a", "a", "a"]


def test_an_empty_ring_returns_no_rows() -> None:
    scheduler: Scheduler[str] = Scheduler()
    assert scheduler.take_chunk(8) == []
    scheduler.add(Asked("empty", 0))
    assert len(scheduler) == 0


def test_a_chunk_is_never_held_back_to_fill_up() -> None:
    assert scheduler_of(Asked("a", 1)).take_chunk(8) == ["a"]


def test_a_new_request_joins_the_ring_at_its_end() -> None:
    scheduler = scheduler_of(Asked("a", 9), Asked("b", 9))
    assert scheduler.take_chunk(1) == ["a"]
    scheduler.add(Asked("c", 1))
    assert scheduler.take_chunk(3) == ["b", "a", "c"]


def test_a_chunk_has_rows_of_one_key_and_the_others_come_next() -> None:
    scheduler = scheduler_of(Asked("a", 5), Asked("x", 2, key="other"), Asked("b", 1), Asked("y", 1, key="other"))
    assert scheduler.take_chunk(3) == ["a", "b", "a"]
    assert scheduler.take_chunk(3) == ["x", "y", "x"]
    assert scheduler.take_chunk(3) == ["a", "a", "a"]


def test_a_cancelled_request_frees_its_rows() -> None:
    gone = Asked("gone", 300)
    scheduler = scheduler_of(gone, Asked("a", 2))
    assert scheduler.take_chunk(2) == ["gone", "a"]
    gone.cancelled = True
    assert scheduler.take_chunk(8) == ["a"]
    assert (len(scheduler), gone.n_taken) == (0, 1)


requests = st.lists(st.tuples(st.integers(1, 30), st.sampled_from("kl"), st.booleans()), min_size=1, max_size=12)


@given(requests, st.integers(1, 8))
def test_every_row_runs_exactly_once_unless_cancelled(made: list[tuple[int, str, bool]], limit: int) -> None:
    asked = [Asked(str(i), n, key, cancelled) for i, (n, key, cancelled) in enumerate(made)]
    scheduler = scheduler_of(*asked)
    while chunk := scheduler.take_chunk(limit):
        assert len(chunk) <= limit
        assert len({asked[int(name)].key for name in chunk}) == 1
    assert len(scheduler) == 0
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
    """However many rows its neighbors brought: ⌈active requests ÷ chunk rows⌉ chunks, plus one for each other key."""
    scheduler = scheduler_of(*(Asked(str(i), n, other) for i, (n, other) in enumerate(made)))
    newcomer = Asked("new", 1, key)
    scheduler.add(newcomer)
    others = {other for _, other in made} - {key}
    by_key = [sum(other == each for _, other in made) for each in others]
    alike = sum(other == key for _, other in made) + 1
    # Each key's round takes ⌈its requests ÷ limit⌉ chunks, and no more than that before the newcomer's turn.
    bound = -(-alike // limit) + sum(-(-n // limit) for n in by_key)
    waited = 1
    while "new" not in scheduler.take_chunk(limit):
        waited += 1
    assert waited <= bound
    assert bound <= -(-(len(made) + 1) // limit) + len(others)


@dataclass
class Sweeping(Asked):
    """A request with rows in sweeps: the next sweep is available once all rows of the last have been returned."""

    sweeps: list[int] = field(default_factory=list)
    n_running: int = field(default=0, init=False)

    def take(self) -> str:
        self.n_running += 1
        return super().take()

    def give(self) -> None:
        self.n_running -= 1
        if not self.n_running and not self.pending and self.sweeps:
            self.pending = self.sweeps.pop(0)


def test_a_request_that_waits_for_its_rows_comes_back_at_the_tail() -> None:
    adaptive = Sweeping("a", 1, sweeps=[2])
    scheduler = scheduler_of(adaptive, Asked("b", 3))
    assert scheduler.take_chunk(1) == ["a"]
    assert len(scheduler) == 1
    adaptive.give()
    scheduler.add(adaptive)
    assert scheduler.take_chunk(1) == ["b"]
    assert scheduler.take_chunk(3) == ["a", "b", "a"]


def test_the_head_is_the_first_that_is_not_cancelled() -> None:
    gone, here = Asked("gone", 3, cancelled=True), Asked("here", 3)
    scheduler = scheduler_of(gone, here)
    assert scheduler.first() is here
    scheduler.remove(here)
    assert scheduler.first() is None
    assert len(scheduler) == 0
    scheduler.remove(here)  # a second time, which is allowed


class Clock:
    """A clock whose unit is one chunk."""

    def __init__(self, scheduler: Scheduler[str], limit: int) -> None:
        self.scheduler, self.limit, self.now = scheduler, limit, 0

    def until(self, name: str) -> int:
        """Run chunks until a request has got a row, and return their number."""
        began = self.now
        while True:
            self.now += 1
            if name in self.scheduler.take_chunk(self.limit):
                return self.now - began


@given(
    st.lists(st.integers(100, 400), max_size=40),
    st.lists(st.integers(0, 30), min_size=1, max_size=20),
    st.integers(1, 8),
)
def test_a_call_of_one_row_never_waits_behind_the_rows_of_a_flood(
    flood: list[int], pauses: list[int], limit: int
) -> None:
    """It waits for its round, ⌈active requests ÷ chunk rows⌉ chunks, at whatever moment it comes."""
    scheduler = scheduler_of(*(Asked(str(i), n) for i, n in enumerate(flood)))
    clock = Clock(scheduler, limit)
    for n, pause in enumerate(pauses):
        for _ in range(pause):
            scheduler.take_chunk(limit)
        bound = -(-(len(scheduler) + 1) // limit)
        scheduler.add(Asked(f"call {n}", 1))
        assert clock.until(f"call {n}") <= bound


def test_callers_get_a_row_each_in_turn_however_many_requests_they_have() -> None:
    flood = [Asked(f"flood {i}", 10_000, caller="flood") for i in range(300)]
    scheduler = scheduler_of(*flood, Asked("a", 5, caller="a"), Asked("b", 1, caller="b"), Asked("b'", 1, caller="b"))
    assert scheduler.take_chunk(3) == ["flood 0", "a", "b"]
    assert scheduler.take_chunk(5) == ["flood 1", "a", "b'", "flood 2", "a"]
    assert scheduler.take_chunk(4) == ["flood 3", "a", "flood 4", "a"]
    assert scheduler.take_chunk(3) == ["flood 5", "flood 6", "flood 7"]


def test_a_caller_with_requests_of_two_keys_has_one_turn() -> None:
    mine = [Asked("a k", 3, "k", caller="a"), Asked("a l", 3, "l", caller="a")]
    scheduler = scheduler_of(*mine, Asked("b l", 3, "l", caller="b"), Asked("c k", 3, "k", caller="c"))
    assert scheduler.take_chunk(2) == ["a k", "c k"]
    assert scheduler.take_chunk(2) == ["b l", "a l"]
    assert scheduler.take_chunk(4) == ["c k", "a k", "c k", "a k"]
    assert scheduler.take_chunk(4) == ["b l", "a l", "b l", "a l"]
    assert len(scheduler) == 0


@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from("kl"), st.sampled_from("abcdef")), max_size=60),
    st.sampled_from("kl"),
    st.integers(1, 8),
)
def test_a_caller_waits_for_a_round_of_callers_and_not_of_their_requests(
    made: list[tuple[int, str, str]], key: str, limit: int
) -> None:
    scheduler = scheduler_of(*(Asked(str(i), n, other, caller=caller) for i, (n, other, caller) in enumerate(made)))
    scheduler.add(Asked("new", 1, key, caller="new"))
    with_key = {each: len({caller for _, other, caller in made if other == each}) for each in "kl"}
    bound = -(-(with_key.pop(key) + 1) // limit) + sum(-(-n // limit) for n in with_key.values())
    assert Clock(scheduler, limit).until("new") <= bound


@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from("kl"), st.sampled_from("abc"), st.booleans()), max_size=20),
    st.integers(1, 8),
)
def test_every_row_of_every_caller_runs_exactly_once_unless_cancelled(
    made: list[tuple[int, str, str, bool]], limit: int
) -> None:
    asked = [Asked(str(i), n, key, cancelled, caller) for i, (n, key, caller, cancelled) in enumerate(made)]
    scheduler = scheduler_of(*asked)
    while chunk := scheduler.take_chunk(limit):
        assert len({asked[int(name)].key for name in chunk}) == 1
    assert len(scheduler) == 0
    assert [each.n_taken for each in asked] == [0 if cancelled else n for n, _, _, cancelled in made]


def test_cancelling_does_not_change_the_order() -> None:
    requests = [Asked(str(i), 3) for i in range(6)]
    scheduler = scheduler_of(*requests)
    requests[1].cancelled = requests[4].cancelled = True
    assert scheduler.take_chunk(3) == ["0", "2", "3"]
    assert scheduler.take_chunk(4) == ["5", "0", "2", "3"]
