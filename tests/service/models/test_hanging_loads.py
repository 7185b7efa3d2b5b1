"""Loads that never end, and engines that are closed."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sidelight
import sidelight_server
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.engine.registry.reloader import Reloader

from support import TESTS
from support.models import reloadable
from support.models.gate import Gate
from support.models.reloadable import SOURCE, write_weights
from support.servers.several_models import FLOATS


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


def test_a_reload_that_hangs_does_not_delay_the_watch_of_other_models(
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


def test_a_reload_that_hangs_delays_no_other_reload_at_a_signal(
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
