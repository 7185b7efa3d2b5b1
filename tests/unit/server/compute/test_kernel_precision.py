"""Precisions of methods and models: those that are refused, and what is reported and measured."""

import asyncio
import time

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from sidelight_server import (
    Engine,
    Gradient,
    IntegratedGradients,
    ModelSpec,
    Settings,
    SmoothGrad,
)
from sidelight_server.errors import ConfigurationError
from torch import Tensor, nn

from support.engines import ask
from support.models import small_cnn
from support.models.kernels import inputs, settings

pytestmark = pytest.mark.slow


def test_a_method_runs_in_its_own_precision_beside_the_others(spec: ModelSpec) -> None:
    x = inputs(2)
    plain = {name: Settings(device="cpu", threads=1, precision=name) for name in ("mixed", "bfloat16")}
    asked = {"float32": Gradient(), "mixed": SmoothGrad(4), "bfloat16": IntegratedGradients(4)}
    precisions = {"smoothgrad": "mixed", "integrated_gradients": "bfloat16"}
    with Engine([spec], Settings(device="cpu", threads=1, method_precision=precisions)) as engine:
        asyncio.run(engine.warm_up())
        own = {name: ask(engine, x, method=method) for name, method in asked.items()}
    for name, method in asked.items():
        with Engine([spec], plain.get(name, Settings(device="cpu", threads=1))) as engine:
            assert np.array_equal(own[name].maps, ask(engine, x, method=method).maps)
        assert own[name].provenance.precision == name
    fidelity = {name: answer.provenance.fidelity for name, answer in own.items()}
    assert fidelity["float32"] == 1 > fidelity["mixed"] > fidelity["bfloat16"] > 0.9


def test_a_precision_of_no_method_is_refused(spec: ModelSpec) -> None:
    with pytest.raises(ConfigurationError, match='method_precision: no method "smothgrad"; did you mean "smoothgrad"'):
        Engine([spec], Settings(device="cpu", method_precision={"smothgrad": "mixed"}))
    with pytest.raises(ConfigurationError, match="method_precision: a reproducible model has one precision"):
        Engine([spec], Settings(device="cpu", reproducible=True, method_precision={"smoothgrad": "mixed"}))
    double = ModelSpec(small_cnn().double(), input_size=(3, 32, 32))
    with pytest.raises(ConfigurationError, match="method_precision: needs a model of float32 weights"):
        Engine([double], Settings(device="cpu", method_precision={"smoothgrad": "mixed"}))


def test_a_model_below_the_demanded_fidelity_is_refused(spec: ModelSpec) -> None:
    with Engine([spec], Settings(device="cpu", precision="bfloat16", fidelity=0.9)) as engine:
        asyncio.run(engine.warm_up())
    with (
        Engine([spec], Settings(device="cpu", precision="bfloat16", fidelity=0.99999)) as engine,
        pytest.raises(ConfigurationError, match=r"fidelity: .* in bfloat16 have a rank correlation of 0\.9"),
    ):
        asyncio.run(engine.warm_up())


class SlowInHalfPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            time.sleep(0.02)
        return self.linear(x.flatten(1))


def test_a_precision_that_is_slower_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    slow = ModelSpec(SlowInHalfPrecision(), input_size=(3, 32, 32))
    with Engine([slow], Settings(device="cpu", precision="float16", max_chunk_rows=4)) as engine:
        asyncio.run(engine.warm_up())
    assert 'event=options_slow model="model" configuration=float16' in caplog.text


def test_answers_and_models_say_what_ran(spec: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sidelight")
    options = {"precision": "bfloat16", "fold": True, "channels_last": True}
    with (
        sidelight_server.serve(spec, device="cpu", **options) as address,
        sidelight.connect(address, connect_timeout=10) as client,
    ):
        model = client.model()
        answer = client.attribute(np.zeros((1, 32, 32, 3), np.uint8))
    assert (model.precision, model.kernel_options) == ("bfloat16", ("fold", "channels_last"))
    tried = {entry.configuration: entry.chosen for entry in model.warmup}
    assert tried["float32"] is False
    assert [entry.configuration for entry in model.warmup if entry.chosen] == ["bfloat16+fold+channels_last"]
    assert answer.provenance.precision == "bfloat16"
    assert answer.provenance.kernel_options == ("fold", "channels_last")
    assert "configuration=bfloat16+fold+channels_last rank_correlation=0.9" in caplog.text
    assert caplog.text.count("event=tried") == len(model.warmup)


@pytest.mark.parametrize("size", [{"max_chunk_rows": 4}, {"reproducible": True, "reproducible_rows": 1}])
def test_what_was_gained_is_measured_also_where_the_settings_say_the_chunk(size: dict[str, object]) -> None:
    spec = ModelSpec(small_cnn(), input_size=(3, 32, 32))
    with Engine([spec], Settings(device="cpu", threads=1, channels_last=True, **size)) as engine:
        asyncio.run(engine.warm_up())
        exact, chosen = engine.model("").warm_up
    assert (exact.configuration, exact.chosen) == ("float32", False)
    assert (chosen.configuration, chosen.chosen) == ("float32+channels_last", True)
    assert exact.rows == chosen.rows == engine.model("").chunk_rows


def test_nothing_is_compared_without_an_option() -> None:
    spec = ModelSpec(small_cnn(), input_size=(3, 32, 32))
    with Engine([spec], Settings(device="cpu", threads=1, max_chunk_rows=4)) as engine:
        asyncio.run(engine.warm_up())
        assert engine.model("").warm_up == ()


def test_the_digest_is_that_of_the_callers_weights(spec: ModelSpec) -> None:
    with Engine([spec], settings("all")) as fast, Engine([spec], Settings(device="cpu")) as exact:
        assert fast.model("").digest == exact.model("").digest


def test_an_unknown_precision_is_refused(spec: ModelSpec) -> None:
    with pytest.raises(ConfigurationError, match="precision: got 'int8': Input should be 'float32', "):
        Engine([spec.replace(precision="int8")])
