"""Several models in one server, models loaded with the first request, and reloads."""

import asyncio
import contextlib
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

import grpc
import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from google.protobuf.duration_pb2 import Duration
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.config.model_settings import ModelSettings
from sidelight_server.engine.registry.reloader import Reloader

from support import TESTS
from support.messages.attribution import BRIEF, attribute, cancel
from support.messages.conversation import Conversation
from support.models import LABELS, reloadable, small_cnn
from support.models.gate import Gate, Gated
from support.models.reloadable import SIZE, SOURCE, write_weights
from support.servers.running import Running
from support.servers.running import serving as running_server
from support.tolerances import NEIGHBORS

FLOATS = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(5)).numpy()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    write_weights(path, seed=1)
    return path


@contextlib.contextmanager
def serving(**settings: object) -> Iterator[sidelight.Client]:
    with (
        sidelight_server.serve(device="cpu", threads=1, **settings) as address,
        sidelight.connect(address, connect_timeout=20) as client,
    ):
        yield client


def maps_of(seed: int) -> np.ndarray:
    with serving_module(seed) as client:
        return client.attribute(FLOATS).maps


@contextlib.contextmanager
def serving_module(seed: int) -> Iterator[sidelight.Client]:
    spec = ModelSpec(small_cnn(seed=seed), input_size=SIZE)
    with sidelight_server.serve(spec, device="cpu", threads=1) as address, sidelight.connect(address) as client:
        yield client


def assert_close(maps: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(maps, expected, rtol=0, atol=NEIGHBORS * np.abs(expected).max())


# Many


def test_each_model_of_a_server_answers_for_itself(tmp_path: Path) -> None:
    paths = {seed: tmp_path / f"{seed}.safetensors" for seed in (1, 2)}
    for seed, path in paths.items():
        write_weights(path, seed=seed)
    models = {
        "first": {"model": SOURCE, "weights": paths[1]},
        "second": {"weights": paths[2], "precision": "bfloat16", "max_example_rows": 5},
    }
    with serving(models=models, model=SOURCE) as client:
        info = client.info()
        assert [each.name for each in info.models] == ["first", "second"]
        assert [each.precision for each in info.models] == ["float32", "bfloat16"]
        assert len({each.digest for each in info.models}) == 2
        assert_close(client.attribute(FLOATS).maps, maps_of(1))  # the first is the default
        assert client.attribute(FLOATS, model="second").provenance.precision == "bfloat16"
        with pytest.raises(sidelight.InvalidArgument, match="max_example_rows is 5"):
            client.attribute(FLOATS, model="second", method=sidelight.SmoothGrad(samples=6))
        client.attribute(FLOATS, model="first", method=sidelight.SmoothGrad(samples=6))
        with pytest.raises(sidelight.NotFound, match='did you mean "second"'):
            client.attribute(FLOATS, model="secnd")


def test_models_side_by_side_do_not_mix() -> None:
    specs = [ModelSpec(small_cnn(seed=seed), input_size=SIZE, name=f"net{seed}") for seed in (1, 2)]
    expected = {f"net{seed}": maps_of(seed) for seed in (1, 2)}
    with Engine(specs, Settings(device="cpu", threads=1)) as engine:

        async def ask_all() -> list[sidelight_server.Answer]:
            names = ["net1", "net2"] * 8
            return await asyncio.gather(*(engine.attribute(sidelight_server.Request(FLOATS, model=n)) for n in names))

        for answer in asyncio.run(ask_all()):
            assert_close(answer.maps, expected[answer.provenance.model])


def test_a_model_s_own_limit_leaves_the_others_alone(gate: Gate) -> None:
    specs = [
        ModelSpec(Gated(gate), input_size=SIZE, name="slow"),
        ModelSpec(small_cnn(), input_size=SIZE, name="free"),
    ]
    settings = Settings(device="cpu,cpu", threads=1, models={"slow": {"max_model_in_flight": 1}})
    with _server(Engine(specs, settings)) as address, sidelight.connect(address, retry=False) as client:
        gate.shut()
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(client.attribute, FLOATS, model="slow")
            assert gate.reached.wait(20)
            with pytest.raises(sidelight.ResourceExhausted, match="max_model_in_flight"):
                client.attribute(FLOATS, model="slow")
            assert not client.attribute(FLOATS, model="free").failures
            gate.open()
            assert not held.result().failures
        assert not client.attribute(FLOATS, model="slow").failures


@contextlib.contextmanager
def _server(engine: Engine) -> Iterator[str]:
    from sidelight_server.app.embedded import _Thread
    from sidelight_server.app.server import Server

    server = Server(engine, listen=["127.0.0.1:0"])
    with _Thread(server, drain_s=5):
        yield server.addresses[0]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"a": {"weights": "w.pt"}}, "models.a.model: not set"),
        ({"a": {"model": SOURCE, "name": "b"}}, "name"),
        (
            {"a": {"model": SOURCE}, "b": {"model": SOURCE, "weights": "no.pt"}},
            "models.b: weights: no.pt does not exist",
        ),
        ({"a": {"modle": SOURCE}}, "models.a.modle: there is no such setting in .*; did you mean model"),
        ({"": {"model": SOURCE}}, "models"),
        ({"a": {"model": "nope:x", "load": "lazy"}}, 'models.a: model: got "nope:x"'),
        ({"a": {"model": "export:no.pt2", "load": "lazy"}}, "models.a: no.pt2 does not exist"),
        ({"a": {"model": SOURCE, "input_size": (3, 32)}}, "models.a.input_size: .*: too few numbers"),
        ({"a": {"model": SOURCE, "input_size": (1, 2)}}, "models.a.input_size"),
    ],
)
def test_tables_of_models_that_are_wrong_are_refused(models: dict[str, object], message: str) -> None:
    with pytest.raises(sidelight_server.ConfigurationError, match=message), serving(models=models):
        pytest.fail("it has started")


def test_a_model_beside_tables_that_say_their_own_is_refused() -> None:
    refused = pytest.raises(sidelight_server.ConfigurationError, match=r"model: got .* but the tables a set their own")
    with refused, serving(model=SOURCE, models={"a": {"model": SOURCE}}):
        pytest.fail("it has started")


# Lazy


def test_a_lazy_model_is_loaded_by_its_first_request(weights: Path) -> None:
    gc.collect()
    before = len(reloadable.alive)
    models = {"now": {"load": "eager"}, "later": {}}
    with serving(model=SOURCE, weights=weights, load="lazy", models=models) as client:
        assert len(reloadable.alive) == before + 1
        assert [(each.name, each.state) for each in client.info().models] == [("now", "serving"), ("later", "unloaded")]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.attribute(FLOATS, model="later"), range(8)))
        assert {answer.provenance.model_version for answer in answers} == {1}  # loaded once for all who waited
        for answer in answers:
            assert_close(answer.maps, maps_of(1))
        assert client.model("later").state == "serving"
        assert client.model("later").warmup


def test_a_lazy_model_that_cannot_be_loaded_fails_its_callers_alone(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    models = {"good": {}, "bad": {"load": "lazy", "weights": bad}}
    with caplog.at_level(logging.ERROR), serving(model=SOURCE, weights=weights, models=models) as client:
        for _ in range(2):
            with pytest.raises(sidelight.FailedPrecondition, match="could not be loaded") as caught:
                client.attribute(FLOATS, model="bad")
            assert str(tmp_path) not in str(caught.value)  # the operator's path is nobody else's to know
        assert caplog.text.count("bad.safetensors") == 1  # tried once, not by every caller
        assert client.model("bad").state == "failed"
        assert not client.attribute(FLOATS, model="good").failures
        (answer,) = client.stream([FLOATS], model="good")
        assert not answer.failures


def test_waiting_for_a_lazy_model_is_within_the_batch_s_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go = threading.Event(), threading.Event()

    def slow() -> ModelSpec:
        loading.set()
        assert go.wait(30)
        return reloadable.net()

    monkeypatch.setattr(reloadable, "slow", slow, raising=False)
    with serving(models={"slow": {"model": "python:support.models.reloadable:slow", "load": "lazy"}}) as client:
        with pytest.raises(sidelight.DeadlineExceeded):
            client.attribute(FLOATS, timeout=0.3)
        assert loading.wait(20)
        go.set()
        assert not client.attribute(FLOATS).failures  # the load that nobody waited for was not thrown away


@contextlib.contextmanager
def _conversing(
    monkeypatch: pytest.MonkeyPatch, gate: Gate, **settings: object
) -> Iterator[tuple[Running, Conversation]]:
    """A stream to a server with a loaded model, and another whose factory waits at the gate."""

    def slow() -> ModelSpec:
        gate.wait(0)
        return reloadable.net()

    monkeypatch.setattr(reloadable, "slow", slow, raising=False)
    models = {"there": {"model": SOURCE}, "slow": {"model": "python:support.models.reloadable:slow", "load": "lazy"}}
    chosen = Settings(models=models, device="cpu", threads=1, **settings)
    engine = Engine(list(chosen.of_models().values()), chosen)
    with running_server(engine, "127.0.0.1:0") as server, Conversation(server.channel) as stream:
        gate.shut()
        yield server, stream


def test_a_model_that_is_loaded_holds_up_neither_its_streams_other_batches_nor_a_cancel(
    monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    with _conversing(monkeypatch, gate) as (server, stream):
        stream.send(*(attribute(f"slow {n}", FLOATS, model="slow") for n in range(3)))
        assert gate.reached.wait(20)
        stream.send(attribute("there", FLOATS, model="there"))
        assert stream.receive().id == "there"
        stream.send(cancel("slow 1"))
        answer = stream.receive()
        assert (answer.id, answer.failure.code) == ("slow 1", grpc.StatusCode.CANCELLED.value[0])
        stream.send(attribute("slow 2", FLOATS, model="slow"))  # which is not answered yet
        answer = stream.receive()
        assert (answer.id, answer.failure.code) == ("slow 2", grpc.StatusCode.INVALID_ARGUMENT.value[0])
        gate.open()
        answers = stream.finish()
        assert sorted(answer.id for answer in answers) == ["slow 0", "slow 2"]
        assert [answer.WhichOneof("outcome") for answer in answers] == ["result"] * 2
        server.until_all_permits_are_back()


def test_batches_that_wait_for_their_model_take_their_streams_slots(
    monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    """So the memory that a caller can make the server hold stays bounded."""
    with _conversing(monkeypatch, gate, max_stream_in_flight=2) as (_, stream):
        stream.send(*(attribute(f"slow {n}", FLOATS, model="slow") for n in range(2)))
        assert gate.reached.wait(20)
        stream.send(attribute("there", FLOATS, model="there"), cancel("slow 1"))
        assert stream.receive().id == "slow 1"
        assert stream.receive().id == "there"  # in the slot that was given back
        gate.open()
        assert [answer.id for answer in stream.finish()] == ["slow 0"]


def test_messages_that_wait_for_their_model_hold_permits(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    with _conversing(monkeypatch, gate, max_in_flight=1) as (server, stream):
        stream.send(*(attribute(f"slow {n}", FLOATS, model="slow") for n in range(2)))
        refused = stream.receive()
        assert (refused.id, refused.failure.code) == ("slow 1", grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert refused.failure.HasField("retry_delay")
        gate.open()
        answers = stream.finish()
        assert [(answer.id, answer.WhichOneof("outcome")) for answer in answers] == [("slow 0", "result")]
        server.until_all_permits_are_back()


def test_a_fault_of_a_batch_is_reported_although_its_model_must_be_loaded(
    monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    with _conversing(monkeypatch, gate) as (_, stream):
        stream.send(
            attribute("wrong", FLOATS, model="slow", timeout=Duration(seconds=-1)),
            attribute("late", FLOATS, model="slow", timeout=BRIEF),
        )
        answers = {answer.id: answer.failure.code for answer in (stream.receive(), stream.receive())}
        assert answers == {
            "wrong": grpc.StatusCode.INVALID_ARGUMENT.value[0],
            "late": grpc.StatusCode.DEADLINE_EXCEEDED.value[0],
        }
        gate.open()
        stream.send(attribute("in time", FLOATS, model="slow"))
        assert [answer.WhichOneof("outcome") for answer in stream.finish()] == ["result"]


def test_a_lazy_model_needs_a_name() -> None:
    with (
        pytest.raises(sidelight_server.ConfigurationError, match=r"load: lazy, .* set name"),
        serving(model=SOURCE, load="lazy"),
    ):
        pytest.fail("it has started")


# Again


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
            spec = load(*source)  # of the weights as they are now
            gate.wait(1)
            return spec

        async def reload_often() -> None:
            began = asyncio.create_task(registry.reload(""))
            assert await asyncio.to_thread(gate.reached.wait, 20)
            write_weights(weights, seed=2)
            later = [asyncio.create_task(registry.reload("")) for _ in range(20)]
            await asyncio.sleep(0.1)
            assert sum(thread.name == "sidelight-load" for thread in threading.enumerate()) == 2
            later.pop().cancel()  # the others still get the reload
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
        assert len(reloadable.alive) <= before  # the new one alone: the old one has gone


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


def test_reloading_wants_leave_a_source_and_a_name(weights: Path) -> None:
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


# Watched


def test_a_changed_file_is_loaded_once_it_rests(weights: Path) -> None:
    settings = Settings(model=SOURCE, weights=weights, device="cpu", threads=1)
    with Engine(list(settings.of_models().values()), settings) as engine:
        watch = Reloader(engine.registry, every_s=1)

        def version_after_a_look() -> int:
            asyncio.run(watch.check())
            return engine.model("").version

        assert [version_after_a_look() for _ in range(2)] == [1, 1]
        write_weights(weights, seed=2)
        assert version_after_a_look() == 1
        write_weights(weights, seed=3)  # it is still being written
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


def _hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> Settings:
    """Two models, of which the first hangs while the gate is shut."""
    monkeypatch.setattr("sidelight_server.engine.registry.registry.PATIENCE_S", 0.05)
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("hanging", "other")}
    for path in paths.values():
        write_weights(path, seed=1)

    def waiting() -> ModelSpec:
        gate.wait(0)
        return reloadable.net()

    monkeypatch.setattr(reloadable, "waiting", waiting, raising=False)
    sources = {"hanging": "python:support.models.reloadable:waiting", "other": SOURCE}
    models = {name: {"model": sources[name], "weights": path} for name, path in paths.items()}
    return Settings(models=models, device="cpu", threads=1)


def _n_loading() -> int:
    return sum(thread.name.startswith(("sidelight-load", "sidelight-watch")) for thread in threading.enumerate())


def test_a_reload_that_hangs_holds_up_the_watch_for_no_other_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    settings = _hanging(tmp_path, monkeypatch, gate)
    with Engine(list(settings.of_models().values()), settings) as engine:

        def versions() -> tuple[int, int]:
            return engine.model("hanging").version, engine.model("other").version

        async def reached(expected: tuple[int, int]) -> None:
            while versions() != expected:
                assert _n_loading() <= 4
                await asyncio.sleep(0.001)

        async def scenario() -> None:
            watching = asyncio.create_task(Reloader(engine.registry, every_s=0.01).run())
            gate.shut()
            for name in ("hanging", "other"):
                write_weights(tmp_path / f"{name}.safetensors", seed=2)
            await reached((1, 2))
            write_weights(tmp_path / "other.safetensors", seed=3)
            await reached((1, 3))
            gate.open()
            await reached((2, 3))
            watching.cancel()

        asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_reload_that_hangs_holds_up_no_other_at_a_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    settings = _hanging(tmp_path, monkeypatch, gate)
    with Engine(list(settings.of_models().values()), settings) as engine:

        async def scenario() -> None:
            gate.shut()
            reloading = asyncio.create_task(engine.registry.reload_all())
            while engine.model("other").version == 1:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            assert engine.model("hanging").version == 1
            gate.open()
            await reloading
            assert engine.model("hanging").version == 2

        asyncio.run(asyncio.wait_for(scenario(), 60))


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


# The doors of the engine


def test_an_engine_takes_modules_and_sources_together(weights: Path) -> None:
    offered = [
        ModelSpec(small_cnn(), input_size=SIZE, name="handed"),
        ModelSettings(model=SOURCE, weights=weights, name="loaded"),
    ]
    with Engine(offered, Settings(device="cpu")) as engine:
        assert list(engine.models) == ["handed", "loaded"]
    with pytest.raises(sidelight_server.ConfigurationError, match='two models are called "handed"'):
        Engine([offered[0], offered[0]], Settings(device="cpu"))


def test_a_factory_that_hangs_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text("import threading\n\ndef net():\n    threading.Event().wait()\n")
    lazy = f'[models.good]\nmodel = "{SOURCE}"\n[models.bad]\nmodel = "python:hanging:net"\nload = "lazy"\n'
    (tmp_path / "sidelight.toml").write_text(lazy)
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "sidelight_server", "--listen", f"unix:{tmp_path}/socket", "--drain-s", "0"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            with sidelight.connect(f"unix:{tmp_path}/socket", connect_timeout=30) as client:
                client.info()
                with pytest.raises(sidelight.DeadlineExceeded):
                    client.attribute(FLOATS, model="bad", timeout=1)
                assert not client.attribute(FLOATS, model="good").failures
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()


def test_a_closed_engine_loads_nothing(weights: Path) -> None:
    settings = Settings(model=SOURCE, weights=weights, device="cpu", name="late", load="lazy")
    engine = Engine(list(settings.of_models().values()), settings)
    engine.start()
    engine.close()
    with pytest.raises(sidelight_server.SidelightError, match="shutting down"):
        asyncio.run(engine.attribute(sidelight_server.Request(FLOATS)))
