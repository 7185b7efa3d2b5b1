"""The runner: a chunk that fails is split until the bad example is alone; one that does not fit is halved."""

import asyncio
import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sidelight_server import Engine, IntegratedGradients, ModelSpec, Request, Settings
from sidelight_server.engine.devices.device_worker import DeviceWorker
from sidelight_server.models.chunk_size import GOOD_CHUNKS, MOST_GOOD_CHUNKS, RowLimit
from sidelight_server.models.model import Model
from sidelight_server.models.warmup import warm_up
from torch import Tensor, nn

from support.engines import tried
from support.models import small_cnn
from support.models.gate import Gate, Gated
from support.tolerances import NEIGHBORS

BAD = 255


class Moody(nn.Module):
    """A model that fails on a marked example, or on chunks that are too large."""

    def __init__(self, mood: str, *, fits: int = 100) -> None:
        super().__init__()
        self.inner = small_cnn()
        self.mood = mood
        self.fits = fits
        self.sizes: list[int] = []
        self.armed = False

    def forward(self, x: Tensor) -> Tensor:
        marked = x[:, 0, 0, 0] > 0.99  # [n]
        if self.armed:
            self.sizes.append(len(x))
            if len(x) > self.fits:
                raise torch.OutOfMemoryError("no room")
            if marked.any() and self.mood == "raise":
                raise RuntimeError("a secret of the model")
        outputs = self.inner(x)
        if self.armed and self.mood == "nan":
            outputs = outputs.masked_fill(marked[:, None], float("nan"))
        return outputs

    def __deepcopy__(self, memo: dict[int, object]) -> "Moody":
        return self  # so that the test can see and arm the module that runs


def explain(module: nn.Module, images: np.ndarray, **settings: object) -> object:
    engine = Engine([ModelSpec(module, input_size=(3, 32, 32))], Settings(**settings))
    module.armed = True
    with engine:
        return asyncio.run(engine.attribute(Request(images)))


@pytest.fixture
def images() -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 200, (8, 32, 32, 3), np.uint8)
    images[5, 0, 0] = BAD
    return images


@pytest.mark.parametrize("mood", ["raise", "nan"])
def test_only_the_bad_example_fails(
    mood: str, images: np.ndarray, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.CRITICAL, logger="sidelight"):
        answer = explain(Moody(mood), images, device=device)
    (failure,) = answer.failures
    assert (failure.example, failure.code) == (5, 13)
    assert 'model "model"' in failure.message
    assert "example 5" in failure.message
    assert "secret" not in failure.message
    assert np.isnan(answer.maps[5]).all()
    good = [0, 1, 2, 3, 4, 6, 7]
    expected = explain(Moody("good"), images, device=device)
    # The good ones ran in smaller chunks: about 1e-6 of a map's maximum.
    np.testing.assert_allclose(answer.maps[good], expected.maps[good], rtol=0, atol=NEIGHBORS * expected.maps.max())


def test_a_chunk_out_of_memory_is_halved_and_the_ceiling_remembered(images: np.ndarray, device: str) -> None:
    module = Moody("good", fits=3)
    engine = Engine([ModelSpec(module, input_size=(3, 32, 32))], Settings(device=device))
    module.armed = True
    with engine:
        first = asyncio.run(engine.attribute(Request(images)))
        assert engine.model("").chunk_rows == 2
        tried = len(module.sizes)
        again = asyncio.run(engine.attribute(Request(images)))
    assert not first.failures
    assert max(module.sizes[tried:]) == 2
    np.testing.assert_allclose(again.maps, first.maps, rtol=0, atol=NEIGHBORS * first.maps.max())


def test_the_ceiling_rises_again_once_memory_is_there(images: np.ndarray, device: str) -> None:
    module = Moody("good", fits=1)
    engine = Engine([ModelSpec(module, input_size=(3, 32, 32))], Settings(device=device))
    model = engine.model("")
    module.armed = True
    with engine:
        answers = [asyncio.run(engine.attribute(Request(images)))]
        assert model.chunk_rows == 1
        module.fits = 100
        while model.chunk_rows < 8 and len(module.sizes) < 200:
            answers.append(asyncio.run(engine.attribute(Request(images))))
    assert not any(answer.failures for answer in answers)
    # Each size serves for a while before the next is tried.
    assert [module.sizes[1:].count(n) >= GOOD_CHUNKS for n in (1, 2, 4)] == [True] * 3
    assert model.chunk_rows == 8


def test_a_chunk_size_that_never_fits_is_tried_less_and_less_often() -> None:
    row_limit, most, fits = RowLimit(), 8, 2
    tried: list[int] = []
    for n_chunks in range(10_000):
        rows = row_limit.of(most)
        if rows <= fits:
            row_limit.passed(rows, most=most)
            continue
        tried.append(n_chunks)
        while rows > fits:
            rows //= 2
            row_limit.lower(rows)
        for _ in range(most // rows):  # the halves of the chunk
            row_limit.passed(rows, most=most)
    waits = np.diff(tried)
    assert (waits[1:6] >= 1.5 * waits[:5]).all()
    assert waits.max() <= MOST_GOOD_CHUNKS  # and yet tried again
    assert len(tried) < 20


def test_another_version_of_a_network_keeps_the_size_that_was_measured_not_the_lowered_one(device: str) -> None:
    models = [Model(ModelSpec(small_cnn(), input_size=(3, 32, 32)), device=torch.device(device)) for _ in range(2)]
    models[0].chunk_rows = 16
    models[0].lacks_memory(above=4)
    assert models[0].chunk_rows == 4
    warm_up(models[1], before=models[0])
    assert models[1].chunk_rows == 16


def test_a_chunk_that_is_filled_up_fails_at_once_and_is_taken_again_when_memory_is_there(
    images: np.ndarray, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Fewer rows would be padded to the same number; without padding, equal bytes could not be promised."""
    module = Moody("good", fits=3)
    settings = Settings(device=device, reproducible=True, reproducible_rows=4)
    engine = Engine([ModelSpec(module, input_size=(3, 32, 32))], settings)
    engine.model("").identity.identify()  # which runs the model too
    module.armed = True
    with engine, caplog.at_level(logging.WARNING, "sidelight"):
        answer = asyncio.run(engine.attribute(Request(images)))
        assert module.sizes == [4, 4]
        assert engine.model("").chunk_rows == 4
        module.fits = 4
        again = asyncio.run(engine.attribute(Request(images)))
    assert [failure.code for failure in answer.failures] == [8] * 8
    assert "out of device memory on 4 rows" in answer.failures[0].message
    assert "reproducible_rows" in answer.failures[0].message
    assert not again.failures
    assert again.provenance.chunk_rows == 4
    assert [message for message in caplog.messages if "event=out_of_memory" in message]


def test_an_example_that_does_not_fit_alone_is_resource_exhausted(
    images: np.ndarray, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="sidelight"):
        answer = explain(Moody("good", fits=0), images[:2], device=device)
    assert [failure.code for failure in answer.failures] == [8, 8]
    assert "out of device memory" in answer.failures[0].message
    lines = [line for line in caplog.messages if line.startswith("event=out_of_memory")]
    # The chunk of both rows names no example, a row run alone names its own; the other row's line would come too soon.
    assert ["example=" in line for line in lines] == [False, True]
    assert lines[1].endswith("example=0")


def test_a_target_beyond_the_classes_of_a_model_of_any_size_fails(device: str, floats: Tensor) -> None:
    """Without an input size the number of classes is unknown until the first rows ran."""
    engine = Engine([ModelSpec(small_cnn())], Settings(device=device))
    with engine:
        answer = asyncio.run(engine.attribute(Request(floats.numpy(), target=10)))
    assert {failure.code for failure in answer.failures} == {3}
    assert "0 to 9" in answer.failures[0].message


def test_rows_that_are_left_when_the_engine_closes_are_unavailable(device: str, floats: Tensor) -> None:
    from sidelight_server.errors import Unavailable

    engine = Engine([ModelSpec(small_cnn())], Settings(device=device))
    engine.start()
    engine.close()
    with pytest.raises(Unavailable):
        asyncio.run(engine.attribute(Request(floats.numpy())))
    assert engine.n_unanswered == 0


class Wayward(nn.Module):
    """A model that executes one step of the test's script at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_cnn()
        self.act = lambda x, outputs: outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x, self.inner(x))

    def __deepcopy__(self, memo: dict[int, object]) -> "Wayward":
        return self


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError, OSError], ids=lambda each: each.__name__)
def test_no_exception_ends_the_thread_that_owns_the_device(error: type, device: str, floats: Tensor) -> None:
    def act(x: Tensor, outputs: Tensor) -> Tensor:
        raise error("no more")

    module = Wayward()
    with Engine([ModelSpec(module)], Settings(device=device)) as engine:
        module.act = act
        failed = asyncio.run(engine.attribute(Request(floats.numpy())))
        assert len(failed.failures) == len(floats)
        module.act = lambda x, outputs: outputs
        assert not asyncio.run(engine.attribute(Request(floats.numpy()))).failures


def test_a_model_that_changes_its_number_of_classes_fails_and_the_server_lives(device: str, floats: Tensor) -> None:
    module = Wayward()
    with Engine([ModelSpec(module)], Settings(device=device, max_chunk_rows=3)) as engine:
        module.act = lambda x, outputs: outputs[:, : len(x) + 4]
        answer = asyncio.run(engine.attribute(Request(floats.numpy(), probabilities=True)))
        assert answer.failures
        assert answer.probabilities.shape[0] == len(floats)
        assert len(asyncio.run(engine.attribute(Request(floats[:3].numpy()))).failures) == 0


def test_a_failed_pass_keeps_no_tensor_alive_while_its_halves_run(device: str, images: np.ndarray) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def act(x: Tensor, outputs: Tensor) -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        held = outputs.exp()  # a tensor of this pass, which its frame holds
        made.append(weakref.ref(held))
        if len(x) > 2:
            raise torch.OutOfMemoryError("no room")
        return held.log()

    module = Wayward()
    with Engine([ModelSpec(module, input_size=(3, 32, 32))], Settings(device=device)) as engine:
        module.act = act
        assert not asyncio.run(engine.attribute(Request(images))).failures
    assert max(alive) == 0


def test_resizing_ends_with_its_caller(device: str) -> None:
    from sidelight_server.engine.preparation.examples import prepare
    from sidelight_server.errors import Cancelled

    n_asked = 0

    def is_gone() -> bool:
        nonlocal n_asked
        n_asked += 1
        return n_asked > 2

    model = Engine([ModelSpec(small_cnn(), input_size=(3, 32, 32))], Settings(device=device)).model("")
    with pytest.raises(Cancelled):
        prepare(model, Request(np.zeros((9, 48, 48, 3), np.uint8)), is_gone=is_gone)
    assert n_asked == 3


# Functions that the device's thread runs between two chunks: warm-up, lazy loads and reloads.


@contextlib.contextmanager
def busy(engine: Engine, images: np.ndarray, **question: object) -> Iterator[asyncio.Future[object]]:
    """A request that is being answered, from another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    asked = asyncio.run_coroutine_threadsafe(engine.attribute(Request(images, **question)), loop)
    try:
        yield asked
    finally:
        asked.cancel()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_function_that_is_cancelled_before_its_turn_does_not_run_and_ends_nothing(
    device: str, gate: Gate, floats: Tensor
) -> None:
    ran: list[str] = []
    with Engine([ModelSpec(Gated(gate))], Settings(device=device)) as engine:
        worker = engine.devices[0].worker
        gate.shut()
        with busy(engine, floats.numpy()) as asked:
            assert gate.reached.wait(30)
            cancelled, kept = (worker.call(lambda name=name: ran.append(name)) for name in ("cancelled", "kept"))
            assert cancelled.cancel()
            gate.open()
            kept.result(30)
            assert not asked.result(30).failures
        assert ran == ["kept"]
        assert not asyncio.run(engine.attribute(Request(floats.numpy()))).failures


def test_a_warm_up_that_is_given_up_leaves_a_device_that_answers(device: str, gate: Gate, floats: Tensor) -> None:
    """SIGTERM cancels the warm-up in this way."""
    with Engine([ModelSpec(Gated(gate), input_size=(3, 32, 32))], Settings(device=device)) as engine:

        async def given_up() -> None:
            gate.shut()
            warming = [asyncio.create_task(engine.warm_up()) for _ in range(2)]  # the second waits for its turn
            await asyncio.to_thread(gate.reached.wait, 30)
            for each in warming:
                each.cancel()
            await asyncio.wait(warming)
            gate.open()

        asyncio.run(given_up())
        assert not asyncio.run(engine.attribute(Request(floats.numpy()))).failures


def test_a_closed_runner_reports_its_end_although_a_function_was_cancelled(device: str, gate: Gate) -> None:
    ended = threading.Event()
    worker = DeviceWorker(torch.device(device), threads=1, on_end=ended.set)
    worker.start()
    gate.shut()
    running = worker.call(lambda: gate.wait(0))
    assert gate.reached.wait(30)
    waiting = [worker.call(lambda: None) for _ in range(2)]
    assert waiting[0].cancel()
    closing = threading.Thread(target=worker.close)
    closing.start()
    gate.open()
    running.result(30)
    closing.join(30)
    assert ended.wait(30)
    assert waiting[1].done()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_function_waits_for_the_chunks_at_the_device_and_for_no_others(
    depth: int, device: str, gate: Gate, floats: Tensor
) -> None:
    engine = tried(Engine([ModelSpec(Gated(gate))], Settings(device=device, max_chunk_rows=1)), floats)
    engine_device = engine.devices[0]
    engine_device.worker = worker = DeviceWorker(torch.device(device), threads=1, depth=depth)
    with engine:
        gate.shut()
        with busy(engine, floats.numpy(), method=IntegratedGradients(steps=100)):
            assert gate.reached.wait(30)
            counted = worker.call(lambda: gate.n_rows)
            assert gate.n_rows == 1
            gate.open()
            assert counted.result(30) <= depth
