"""Models that are loaded again: versions, failures, and files that changed."""

import asyncio
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.engine.registry.reloader import Reloader

from support import TESTS
from support.models import LABELS, reloadable, small_cnn
from support.models.gate import Gate
from support.models.reloadable import SIZE, SOURCE, write_weights
from support.servers.several_models import FLOATS, assert_close, maps_of, serving


def test_a_reloaded_model_is_another_version_with_other_maps(weights: Path) -> None:
    with serving(model=SOURCE, weights=weights, allow_reload=True) as client:
        first = client.attribute(FLOATS)
        write_weights(weights, seed=2)
        loaded = client.reload()
        second = client.attribute(FLOATS)
        assert (first.provenance.model_version, second.provenance.model_version) == (1, 2) == (1, loaded.version)
        assert second.provenance.model_digest == loaded.digest != first.provenance.model_digest
        assert_close(first.maps, maps_of(1))
        assert_close(second.maps, maps_of(2))
        assert client.reload().digest == loaded.digest  # of the same weights


def test_no_request_is_lost_or_mixed_while_models_are_reloaded(weights: Path) -> None:
    expected = {1: maps_of(1), 0: maps_of(2)}  # by the version's parity: odd ones have the first weights
    with serving(model=SOURCE, weights=weights, allow_reload=True) as client:
        over = threading.Event()

        def endless() -> Iterator[np.ndarray]:
            while not over.is_set():
                yield FLOATS

        def stream() -> list[sidelight.Attribution]:
            return list(client.stream(endless(), allow_model_change=True))

        def call() -> list[sidelight.Attribution]:
            answers = []
            while not over.is_set():
                answers.append(client.attribute(FLOATS))
            return answers

        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(stream), pool.submit(call), pool.submit(call)]
            try:
                for version in range(2, 6):
                    write_weights(weights, seed=2 - version % 2)
                    assert client.reload().version == version
            finally:
                over.set()
            answers = [answer for each in running for answer in each.result()]
    assert {answer.provenance.model_version for answer in answers} >= {1, 2, 3, 4}
    for answer in answers:
        assert not answer.failures
        assert_close(answer.maps, expected[answer.provenance.model_version % 2])


def test_a_running_request_ends_on_the_version_it_began_on(weights: Path) -> None:
    method = sidelight.IntegratedGradients(steps=1000)
    with (
        serving(model=SOURCE, weights=weights, allow_reload=True, max_chunk_rows=1) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        running = pool.submit(client.attribute, FLOATS, method=method, score="logit")
        assert not client.attribute(FLOATS[:1]).failures
        write_weights(weights, seed=2)
        client.reload()
        assert not running.done()
        assert client.attribute(FLOATS).provenance.model_version == 2
        answer = running.result()
    assert answer.provenance.model_version == 1
    assert not answer.failures
    # Completeness: the sum of the map is the rise of the score, which only one network's gradients give.
    assert all(each.relative_completeness_error < 1e-2 for each in answer.convergence)


def test_reloads_that_wait_for_one_that_runs_are_one(
    weights: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(model=SOURCE, weights=weights, device="cpu", threads=1)
    with Engine(list(settings.of_models().values()), settings) as engine:
        load, registry = sidelight_server.models.sources.load, engine.registry

        def gated(*source: object) -> ModelSpec:
            spec = load(*source)  # with the current weights
            gate.wait(1)
            return spec

        async def reload_often() -> None:
            began = asyncio.create_task(registry.reload(""))
            assert await asyncio.to_thread(gate.reached.wait, 20)
            write_weights(weights, seed=2)
            later = [asyncio.create_task(registry.reload("")) for _ in range(20)]
            await asyncio.sleep(0.1)
            assert sum(thread.name == "sidelight-load" for thread in threading.enumerate()) == 2
            later.pop().cancel()  # the other callers still get the reload
            gate.open()
            await asyncio.gather(began, *later)

        monkeypatch.setattr(sidelight_server.models.sources, "load", gated)
        gate.shut()
        asyncio.run(reload_often())
        assert (registry.serving("")[0].version, gate.n_rows) == (3, 2)
        assert_close(asyncio.run(engine.attribute(sidelight_server.Request(FLOATS))).maps, maps_of(2))


def test_a_request_is_answered_by_the_version_that_served_when_it_came(weights: Path) -> None:
    """Its permit and its region of shared memory have the size for that version."""
    settings = Settings(model=SOURCE, weights=weights, device="cpu", threads=1)
    with Engine(list(settings.of_models().values()), settings) as engine:
        came = engine.registry.serving("")
        write_weights(weights, seed=2)
        asyncio.run(engine.registry.reload(""))
        answer = asyncio.run(engine.attribute(sidelight_server.Request(FLOATS), version=came))
        assert answer.provenance.model_version == 1
        assert_close(answer.maps, maps_of(1))
        assert asyncio.run(engine.attribute(sidelight_server.Request(FLOATS))).provenance.model_version == 2


def broken(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def missing(path: Path) -> None:
    path.unlink()


def of_another_network(path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file(small_cnn(1).state_dict(), path)


@pytest.mark.parametrize("spoil", [broken, missing, of_another_network])
def test_a_failed_reload_keeps_the_old_version_and_nothing_of_the_new(weights: Path, spoil: object) -> None:
    with serving(model=SOURCE, weights=weights, allow_reload=True) as client:
        gc.collect()
        before = len(reloadable.alive)
        spoil(weights)
        with pytest.raises(sidelight.FailedPrecondition, match=r"weights: .*net.safetensors") as caught:
            client.reload()
        assert "\n" not in str(caught.value)
        del caught
        assert client.attribute(FLOATS).provenance.model_version == 1
        gc.collect()
        assert len(reloadable.alive) <= before
        write_weights(weights, seed=2)
        assert client.reload().version == 2
        client.attribute(FLOATS)
        gc.collect()
        assert len(reloadable.alive) <= before  # only the new one is left


@pytest.mark.parametrize("spoil", [broken, of_another_network, None])
def test_a_factory_that_returns_the_module_that_serves_changes_no_map_of_it(weights: Path, spoil: object) -> None:
    with serving(model="python:support.models.reloadable:cached", weights=weights, allow_reload=True) as client:
        first = client.attribute(FLOATS)
        if spoil:
            spoil(weights)
            with pytest.raises(sidelight.FailedPrecondition):
                client.reload()
            again = client.attribute(FLOATS)
            assert again.provenance == first.provenance
            np.testing.assert_array_equal(again.maps, first.maps)
        else:
            write_weights(weights, seed=2)
            client.reload()
            assert_close(client.attribute(FLOATS).maps, maps_of(2))
        assert_close(first.maps, maps_of(1))


def test_reloading_needs_permission_a_source_and_a_name(weights: Path) -> None:
    with serving(model=SOURCE, weights=weights) as client:
        with pytest.raises(sidelight.exceptions.PermissionDenied, match="allow_reload"):
            client.reload()
        assert client.model().version == 1
    with (
        sidelight_server.serve(ModelSpec(small_cnn(), input_size=SIZE), device="cpu", allow_reload=True) as address,
        sidelight.connect(address) as client,
    ):
        with pytest.raises(sidelight.FailedPrecondition, match="passed as a module"):
            client.reload()
        with pytest.raises(sidelight.NotFound, match='there is no "nett"'):
            client.reload("nett")


def test_a_reload_by_the_asynchronous_client(weights: Path) -> None:
    async def reload(address: str) -> int:
        async with sidelight.aio.connect(address) as client:
            return (await client.reload()).version

    with sidelight_server.serve(SOURCE, weights=weights, device="cpu", allow_reload=True) as address:
        assert asyncio.run(reload(address)) == 2


def test_labels_are_read_again(weights: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(LABELS))
    with serving(model=SOURCE, weights=weights, class_names=labels, allow_reload=True) as client:
        labels.write_text("\n".join(f"{each}!" for each in LABELS))
        assert client.attribute(FLOATS).predictions[0].label in LABELS
        client.reload()
        assert client.attribute(FLOATS).predictions[0].label.endswith("!")
        labels.write_text("one")
        with pytest.raises(sidelight.FailedPrecondition, match=r"class_names: .*labels.txt: got 1"):
            client.reload()


def test_a_changed_file_is_loaded_once_it_is_stable(weights: Path) -> None:
    settings = Settings(model=SOURCE, weights=weights, device="cpu", threads=1)
    with Engine(list(settings.of_models().values()), settings) as engine:
        watch = Reloader(engine.registry, every_s=1)

        def version_after_a_look() -> int:
            asyncio.run(watch.check())
            return engine.model("").version

        assert [version_after_a_look() for _ in range(2)] == [1, 1]
        write_weights(weights, seed=2)
        assert version_after_a_look() == 1
        write_weights(weights, seed=3)  # the file is still being written
        assert version_after_a_look() == 1
        assert version_after_a_look() == 2
        assert version_after_a_look() == 2
        broken(weights)
        assert [version_after_a_look() for _ in range(4)] == [2] * 4
        assert engine.registry.find("").failure
        write_weights(weights, seed=1)
        assert [version_after_a_look() for _ in range(2)] == [2, 3]


def test_a_server_that_watches_loads_what_changes(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), serving(model=SOURCE, weights=weights, watch_s=0.05) as client:
        write_weights(weights, seed=2)
        for _ in range(2000):
            answer = client.attribute(FLOATS)
            if answer.provenance.model_version == 2:
                break
        assert_close(answer.maps, maps_of(2))


def test_sighup_loads_again_and_the_process_lives(tmp_path: Path, weights: Path) -> None:
    command = [sys.executable, "-m", "sidelight_server", "--model", SOURCE, "--weights", str(weights)]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    with subprocess.Popen(
        [*command, "--listen", f"unix:{tmp_path}/socket", "--threads", "1"],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            lines = []
            while not lines or "event=serving" not in lines[-1]:
                lines.append(process.stderr.readline())
                assert lines[-1], lines
            with sidelight.connect(f"unix:{tmp_path}/socket", connect_timeout=20) as client:
                for version, spoil in ((2, lambda path: write_weights(path, seed=2)), (2, broken)):
                    spoil(weights)
                    process.send_signal(signal.SIGHUP)
                    line = process.stderr.readline()
                    assert ("event=loaded" if spoil is not broken else "event=load_failed") in line
                    assert client.attribute(FLOATS).provenance.model_version == version
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()
