"""Several models in one server: answers, limits, settings."""

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sidelight
import sidelight_server
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.config.model_settings import ModelSettings

from support.models import small_cnn
from support.models.gate import Gate, Gated
from support.models.reloadable import SIZE, SOURCE, write_weights
from support.servers.several_models import FLOATS, assert_close, maps_of, serving


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


def test_a_model_option_beside_a_table_that_sets_its_own_is_refused() -> None:
    refused = pytest.raises(sidelight_server.ConfigurationError, match=r"model: got .* but the tables a set their own")
    with refused, serving(model=SOURCE, models={"a": {"model": SOURCE}}):
        pytest.fail("it has started")


# The engine by itself


def test_an_engine_takes_modules_and_sources_together(weights: Path) -> None:
    offered = [
        ModelSpec(small_cnn(), input_size=SIZE, name="handed"),
        ModelSettings(model=SOURCE, weights=weights, name="loaded"),
    ]
    with Engine(offered, Settings(device="cpu")) as engine:
        assert list(engine.models) == ["handed", "loaded"]
    with pytest.raises(sidelight_server.ConfigurationError, match='two models are called "handed"'):
        Engine([offered[0], offered[0]], Settings(device="cpu"))
