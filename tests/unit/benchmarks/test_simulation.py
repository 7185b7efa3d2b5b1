"""Laws of the simulation: the client's scheduling on a virtual clock, with deaths, compared with the ideal queue."""

import pytest

from benchmarks.simulation.system import System, ideal, simulate


@pytest.mark.parametrize(("n_servers", "n_batches"), [(1, 500), (3, 1500), (16, 3000)])
def test_one_client_uses_all_servers_nearly_as_one_queue_would(n_servers: int, n_batches: int) -> None:
    system = System(n_servers, n_batches, load=0.8)
    outcome = simulate(system)
    assert (outcome.n_lost, outcome.n_doubled, outcome.n_given_up) == (0, 0, 0)
    assert outcome.p99_s <= 2 * ideal(system).p99_s
    saturated = simulate(System(n_servers, 2 * n_batches))
    assert saturated.utilization >= 0.95


@pytest.mark.parametrize("hedge_after_s", [None, 0.2])
def test_nothing_is_lost_or_doubled_while_servers_die(hedge_after_s: float | None) -> None:
    system = System(8, 3000, n_clients=3, load=0.7, mean_life_s=10.0, restart_s=1.0, hedge_after_s=hedge_after_s)
    outcome = simulate(system)
    assert (outcome.n_lost, outcome.n_doubled) == (0, 0)
    assert outcome.n_given_up <= 3  # alone on two servers that died: rare, and reported as an error
    assert bool(outcome.n_late) == (hedge_after_s is not None)
