"""Networks that are cut or stalled, and real processes that are killed during a stream."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import sidelight

from support.servers.processes import process
from support.servers.proxy import proxy
from support.servers.streams import assert_all_answered
from support.tolerances import NEIGHBORS

# Connections that are cut or stalled.


def tiny(n: int) -> list[np.ndarray]:
    return [np.random.default_rng(i).normal(size=(1, 3, 32, 32)).astype(np.float32) for i in range(n)]


def test_a_network_that_is_cut_again_and_again_loses_and_doubles_nothing(address: str) -> None:
    with proxy(address) as network, sidelight.connect(network.address, connect_timeout=10) as client:
        places = []
        for each in client.stream(tiny(300), window=16, timeout=60):
            places.append(each.index)
            if len(places) in (20, 100, 101, 250):
                network.cut()
    assert sorted(places) == list(range(300))
    assert network.n_connections >= 4  # two of the cuts may affect the same connection


def test_a_network_that_stalls_for_a_while_only_delays_the_stream(address: str) -> None:
    with proxy(address) as network, sidelight.connect(network.address, connect_timeout=10) as client:
        answers = client.stream(tiny(100), window=8, timeout=60)
        next(answers)
        network.stall()
        waiting = threading.Timer(1.0, network.flow)
        waiting.start()
        assert len(list(answers)) == 99
        assert network.n_connections == 1
        waiting.join()


def test_batches_of_a_stalled_network_go_to_another_server_once_it_is_cut(address: str) -> None:
    with proxy(address) as network, sidelight.connect([network.address, address], connect_timeout=10) as client:
        places = []
        for each in client.stream(tiny(300), window=32, timeout=60):
            places.append(each.index)
            if len(places) == 30:
                network.stall()
            if len(places) == 200:  # the other worker continued alone
                network.cut()
                network.flow()
    assert sorted(places) == list(range(300))


def test_a_network_that_delays_everything_costs_only_time(address: str) -> None:
    with proxy(address) as network, sidelight.connect(network.address, connect_timeout=10) as client:
        network.delay_s = 0.02
        assert_all_answered(list(client.stream(tiny(60), ordered=True)), 60)


# Server processes that are killed.


@contextlib.contextmanager
def rising_again(model: str, address: str) -> Iterator[list[int]]:
    """Run a server that is started again whenever it dies; yield the list of its process ids."""
    ids: list[int] = []
    ended = threading.Event()

    def keep() -> None:
        while not ended.is_set():
            with process(model, address) as server:
                ids.append(server.pid)
                started.set()
                while server.poll() is None and not ended.wait(0.02):
                    pass

    started = threading.Event()
    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        assert started.wait(60)
        yield ids
    finally:
        ended.set()
        keeper.join()


def batches_of(n: int) -> list[np.ndarray]:
    return [np.random.default_rng(i).normal(size=(1 + i % 3, 3, 16, 16)).astype(np.float32) for i in range(n)]


def test_a_server_that_is_killed_under_a_stream_loses_and_doubles_nothing(tmp_path: Path) -> None:
    batches, address = batches_of(300), f"unix:{tmp_path}/socket"
    with rising_again("small", address) as ids, sidelight.connect(address, connect_timeout=60) as client:
        undisturbed = list(client.stream(batches, ordered=True))
        places = []
        for each in client.stream(batches, window=8, timeout=60):
            places.append(each.index)
            if len(places) in (50, 200):
                os.kill(ids[-1], signal.SIGKILL)
            expected = undisturbed[each.index].maps
            np.testing.assert_allclose(each.maps, expected, rtol=0, atol=NEIGHBORS * expected.max())
    assert sorted(places) == list(range(300))
    assert len(ids) == 3


def test_a_batch_that_kills_its_server_is_given_up_and_the_rest_goes_on(tmp_path: Path) -> None:
    batches, address = batches_of(40), f"unix:{tmp_path}/socket"
    batches[20][:] = 666.0
    with rising_again("poisoned", address) as ids:
        with sidelight.connect(address, connect_timeout=60) as client:
            answers = list(client.stream(batches, ordered=True, on_error="return"))
        n_deaths = len(ids) - 1
    assert [each.index for each in answers] == list(range(40))
    assert [each.index for each in answers if each.error is not None] == [20]
    assert type(answers[20].error) is sidelight.exceptions.ServerDied
    assert n_deaths <= 3


# Client processes that are killed.


def test_a_client_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    script = (
        "import itertools, numpy, sidelight, sys\n"
        "with sidelight.connect(sys.argv[1]) as client:\n"
        "    for answer in client.stream(itertools.repeat(numpy.zeros((1, 3, 16, 16), 'float32'))):\n"
        "        print('answered', flush=True)\n"
    )
    address = f"unix:{tmp_path}/socket"
    with process("small", address, "--max-in-flight", "1") as server:
        observed = psutil.Process(server.pid)
        with sidelight.connect(address, connect_timeout=10) as client:
            client.attribute(batches_of(1)[0])
        n_descriptors = None
        for _ in range(3):
            with subprocess.Popen([sys.executable, "-c", script, address], stdout=subprocess.PIPE, text=True) as caller:
                assert caller.stdout.readline() == "answered\n"
                caller.kill()
            with sidelight.connect(address, connect_timeout=10) as client:
                client.attribute(batches_of(1)[0], timeout=30)  # would be refused if the one permit were not released
            n_descriptors = n_descriptors or observed.num_fds()
        until_s = time.monotonic() + 30
        while observed.num_fds() > n_descriptors and time.monotonic() < until_s:  # a connection ends a moment later
            time.sleep(0.05)
        assert observed.num_fds() <= n_descriptors
