"""An answer identifies its model: the weights by their digest, the computation by its canary."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.compute.weights import ChangeDetector
from torch import Tensor, nn

from support.engines import ask
from support.models import small_cnn

SIZE = (3, 32, 32)


def batch(n: int = 2) -> np.ndarray:
    return torch.rand(n, *SIZE, generator=torch.Generator().manual_seed(1)).numpy()


SETTINGS = Settings(device="cpu", threads=1, max_chunk_rows=8)  # which are not measured then: that would take long


@contextmanager
def engine_of(module: nn.Module, **traits: object) -> Iterator[Engine]:
    with Engine([ModelSpec(module, **{"input_size": SIZE, **traits})], SETTINGS) as engine:
        yield engine


def identity(module: nn.Module, **traits: object) -> tuple[str, str]:
    with engine_of(module, **traits) as engine:
        provenance = ask(engine, batch()).provenance
    return provenance.model_digest, provenance.model_canary


class Tempered(nn.Module):
    """A network with a number of its own that is neither parameter nor buffer."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.inner, self.temperature = small_cnn(), temperature

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / self.temperature


def replaced(place: int, by: nn.Module) -> nn.Module:
    module = small_cnn()
    module[place] = by
    return module


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (small_cnn, lambda: replaced(5, nn.GELU())),
        (small_cnn, lambda: replaced(3, nn.AvgPool2d(2))),
        (Tempered, lambda: Tempered(2.0)),
    ],
    ids=["activation", "pooling", "attribute"],
)
def test_equal_weights_in_another_network_have_another_canary(
    one: Callable[[], nn.Module], other: Callable[[], nn.Module]
) -> None:
    first, again, second = identity(one()), identity(one()), identity(other())
    assert first == again
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert first[1].startswith("3×32×32:")


def test_the_canary_of_a_model_is_reported_and_does_not_change_with_requests() -> None:
    with engine_of(small_cnn()) as engine:
        answers = [ask(engine, batch(n)) for n in (1, 3)]
        canary = engine.model("").identity.canary
    assert {each.provenance.model_canary for each in answers} == {canary}


def test_a_model_of_any_size_has_a_canary_of_the_size_it_was_tried_with() -> None:
    class AnySize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3))

    assert identity(AnySize(), input_size=None, trial_size=(3, 8, 8))[1].startswith("3×8×8:")
    assert identity(AnySize(), input_size=None)[1] == ""  # it was not tried with any


def add_in_place(module: nn.Module) -> None:
    module[0].weight.data.add_(0.1)


def add_to_one_element(module: nn.Module) -> None:
    module[8].weight.data[3, 7] += 1e-3


def assign(module: nn.Module) -> None:
    module.load_state_dict({name: value * 1.1 for name, value in module.state_dict().items()}, assign=True)


def new_parameter(module: nn.Module) -> None:
    module[0].weight = nn.Parameter(module[0].weight.detach() * 1.1)


def new_data(module: nn.Module) -> None:
    module[0].weight.data = module[0].weight.data * 1.1


def new_layer(module: nn.Module) -> None:
    module[8] = nn.Linear(4096, 10)


def step(module: nn.Module) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.rand(2, *SIZE)).square().sum().backward()
    optimizer.step()


CHANGES = [add_in_place, add_to_one_element, assign, new_parameter, new_data, new_layer, step]


@pytest.mark.parametrize("options", [{}, {"fold": True}, {"precision": "bfloat16"}, {"input_size": None}], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_noticed(change: Callable[[nn.Module], None], options: dict[str, object]) -> None:
    module = small_cnn().eval()
    with engine_of(module, **options) as engine:
        before = ask(engine, batch())
        change(module)
        after = ask(engine, batch())
    with engine_of(module, **options) as engine:
        anew = ask(engine, batch())
    assert after.provenance.model_digest == anew.provenance.model_digest != before.provenance.model_digest
    assert after.provenance.model_canary == anew.provenance.model_canary
    assert bool(after.provenance.model_canary) == ("input_size" not in options)
    if change is not add_to_one_element and after.provenance.model_canary:  # of which a single input may show nothing
        assert after.provenance.model_canary != before.provenance.model_canary
    np.testing.assert_array_equal(after.maps, anew.maps)


def test_an_answer_whose_weights_were_written_during_it_is_reported() -> None:
    class Writing(nn.Module):
        """A model during whose pass the caller's weights are written."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = small_cnn()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            if armed.is_set() and len(x) == 2:
                with torch.no_grad():
                    originals[0].mul_(1.5)
            return y

    armed = threading.Event()
    module = Writing().eval()
    originals = list(module.parameters())
    with engine_of(module) as engine:
        assert ask(engine, batch()).provenance.model_digest
        armed.set()
        provenance = ask(engine, batch()).provenance
        armed.clear()
        after = ask(engine, batch()).provenance
    assert (provenance.model_digest, provenance.model_canary) == ("", "")
    assert (after.model_digest, after.model_canary) == identity(module)


def test_replay_names_the_canary_of_another_network(tmp_path: Path) -> None:
    with served(small_cnn()) as client:
        client.attribute(batch()).save(tmp_path / "answer")
    with served(replaced(5, nn.GELU())) as client:
        replayed = sidelight.replay(client, tmp_path / "answer", batch())
    assert "model_canary" in {each.name for each in replayed.differences}
    with served(small_cnn()) as client:
        assert not sidelight.replay(client, tmp_path / "answer", batch()).differences
        assert client.model().canary


@contextmanager
def served(module: nn.Module) -> Iterator[sidelight.Client]:
    spec = ModelSpec(module, input_size=SIZE)
    with (
        sidelight_server.serve(spec, device="cpu", max_chunk_rows=8) as address,
        sidelight.connect(address) as client,
    ):
        yield client


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64])
def test_a_change_of_each_element_of_a_shared_module_is_detected(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.register_buffer("held", torch.zeros(3, 7).to(dtype).t())
    detector = ChangeDetector(module, is_shared=True)
    seen = detector.check(at_values=True)
    for place in range(21):
        assert detector.check(at_values=True) == seen
        module.held.data[place // 3, place % 3] = 1
        assert detector.check() == seen  # torch has not counted that
        seen, before = detector.check(at_values=True), seen
        assert seen.written == before.written + 1
