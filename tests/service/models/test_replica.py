"""The replica: the caller's module is not written to, kept or run, and modules that torch cannot copy are served."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from sidelight_server import ModelSpec
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from support.models import small_cnn
from support.tolerances import NEIGHBORS

SIZE = (3, 32, 32)


def batch(n: int = 2) -> np.ndarray:
    return torch.rand(n, *SIZE, generator=torch.Generator().manual_seed(1)).numpy()


@contextmanager
def served(module: nn.Module, **traits: object) -> Iterator[sidelight.Client]:
    spec = ModelSpec(module, **{"input_size": SIZE, **traits})
    with sidelight_server.serve(spec, device="cpu", max_chunk_rows=8) as address, sidelight.connect(address) as client:
        yield client


def saliency(module: nn.Module, x: np.ndarray) -> Tensor:
    """Return the gradient of each example's largest probability, as torch gives it."""
    leaf = torch.tensor(x, requires_grad=True)
    probability = module(leaf).softmax(1).amax(1).sum()
    return torch.autograd.grad(probability, leaf)[0].abs().amax(1)


class AlwaysTraining(nn.BatchNorm2d):
    """A norm that always normalizes by the batch: it never goes to eval mode."""

    def train(self, mode: bool = True) -> "AlwaysTraining":
        return super().train(True)


class Averaging(nn.Module):
    """Counts its passes and keeps a moving average of its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.average.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return self.inner(x)


def training_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), AlwaysTraining(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 900, 5))


@pytest.mark.parametrize("options", [{}, {"fold": True}, {"input_size": None}], ids=str)
@pytest.mark.parametrize("make", [training_norm, lambda: Averaging(small_cnn())], ids=["norm", "counter"])
def test_buffers_that_a_pass_writes_are_not_the_callers(make: object, options: dict[str, object]) -> None:
    module = make()
    before = copy.deepcopy(module.state_dict())
    versions = [each._version for each in module.buffers()]
    with served(module, **options) as client:
        answers = list(client.stream([batch(), batch(), batch()]))  # which ends in ModelChanged where a digest changes
        digest = client.info().models[0].digest
    assert {each.provenance.model_digest for each in answers} == {digest}
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [each._version for each in module.buffers()] == versions


def test_a_buffer_that_the_caller_writes_shows_although_a_pass_writes_it_too() -> None:
    class Shifted(Averaging):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.average.sum().sigmoid())

    module = Shifted(small_cnn())
    with served(module) as client:
        before = client.attribute(batch()).provenance.model_digest
        module.average.fill_(0.5)
        after = client.attribute(batch()).provenance.model_digest
    assert before != after


def test_hooks_of_the_caller_neither_run_nor_keep_anything(caplog: pytest.LogCaptureFixture) -> None:
    module = small_cnn()
    module[2] = nn.ReLU()  # a backward hook and a rectifier in place do not go together
    expected = saliency(module.eval(), batch())
    kept: list[object] = []
    for each in module.modules():
        each.register_forward_hook(lambda *held: kept.append(held))
        each.register_forward_pre_hook(lambda *held: kept.append(held))
        each.register_full_backward_hook(lambda *held: kept.append(held))
        each.register_state_dict_post_hook(lambda *held: kept.append(held))
    module(torch.rand(1, *SIZE))
    with caplog.at_level(logging.INFO), served(module) as client:
        kept.clear()  # from the one pass at load that compares outputs with and without them
        maps = client.attribute(batch(), method=sidelight.Gradient()).maps
        client.attribute(batch(), method=sidelight.GradCAM())
    assert not kept
    np.testing.assert_array_equal(maps, expected.numpy())
    assert any("hooks_dropped" in record.getMessage() for record in caplog.records)
    module(torch.rand(1, *SIZE))
    assert kept  # the caller's own passes still run them


def test_a_hook_that_the_outputs_depend_on_is_part_of_the_network(caplog: pytest.LogCaptureFixture) -> None:
    module = small_cnn().eval()
    module[0].register_forward_hook(lambda _module, _inputs, output: output.tanh())
    expected = saliency(module, batch())
    with caplog.at_level(logging.INFO), served(module) as client:
        maps = client.attribute(batch()).maps
    np.testing.assert_array_equal(maps, expected.numpy())
    assert any("hooks_kept" in record.getMessage() for record in caplog.records)


class Remembering(nn.Module):
    """Keeps its last features as an attribute, as many modules do for inspection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_cnn()
        self.last: Tensor | None = None
        self.all: dict[str, list[Tensor]] = {"features": []}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner(x)
        self.all["features"] = [self.last * 2]
        return self.last


def normed(how: str) -> nn.Module:
    module = small_cnn()
    first = next(each for each in module.modules() if isinstance(each, nn.Conv2d))
    torch.manual_seed(0)
    with pytest.warns(FutureWarning) if how == "weight_norm" else contextmanager(lambda: iter([None]))():
        {
            "weight_norm": lambda: nn.utils.weight_norm(first),
            "spectral_norm": lambda: nn.utils.spectral_norm(first),
            "pruned": lambda: prune.l1_unstructured(first, "weight", 0.3),
            "pruned twice": lambda: prune.random_unstructured(
                prune.l1_unstructured(first, "weight", 0.3), "weight", 0.3
            ),
            "parametrized": lambda: parametrizations.weight_norm(first),
            "spectral, parametrized": lambda: parametrizations.spectral_norm(first),
        }[how]()
    return module


KINDS = ("weight_norm", "spectral_norm", "pruned", "pruned twice", "parametrized", "spectral, parametrized")


@pytest.mark.parametrize("how", KINDS)
def test_a_weight_that_is_computed_before_each_pass_is_served(how: str) -> None:
    module = normed(how)
    module(torch.rand(2, *SIZE)).sum().backward()  # as after a step of training: the weight belongs to a graph
    module.eval()
    module(torch.rand(2, *SIZE))
    with served(module) as client:
        maps = client.attribute(batch()).maps
        expected = saliency(module, batch())
        with torch.no_grad():
            for each in module.parameters():
                each.mul_(1.5)
        trained, wanted = client.attribute(batch()).maps, saliency(module, batch())
    np.testing.assert_array_equal(maps, expected.numpy())
    np.testing.assert_array_equal(trained, wanted.numpy())
    assert not np.array_equal(trained, maps)


def test_activations_that_a_module_keeps_are_no_obstacle() -> None:
    module = Remembering().eval()
    expected = saliency(module, batch())
    last, features = module.last, module.all["features"]
    assert last is not None
    assert last.grad_fn is not None
    with served(module) as client:
        np.testing.assert_array_equal(client.attribute(batch()).maps, expected.numpy())
    assert module.last is last
    assert module.all["features"] is features


@pytest.mark.parametrize("how", KINDS)
def test_a_convolution_whose_weight_is_computed_is_folded(how: str) -> None:
    module = normed(how).eval()
    module(torch.rand(2, *SIZE))
    expected = saliency(module, batch())
    with served(module, fold=True) as client:
        answer = client.attribute(batch())
        assert "fold" in answer.provenance.kernel_options
    # As in tests of the kernel's options: in float32 the order of additions.
    assert np.linalg.norm(answer.maps - expected.numpy()) <= NEIGHBORS * float(expected.norm())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Conv2d(3, 3, 3, padding=1), small_cnn()
        self.use_checkpoint = True

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x, use_reentrant=True) if self.use_checkpoint else self.first(x)
        return self.rest(x)


def test_gradient_checkpointing_is_off_in_the_replica() -> None:
    module = Checkpointed().eval()
    with served(module) as client:
        maps = client.attribute(batch()).maps
    assert module.use_checkpoint
    module.use_checkpoint = False
    np.testing.assert_array_equal(maps, saliency(module, batch()).numpy())


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler at itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # which also uses what torch deprecates
def test_guided_backpropagation_runs_on_a_compiled_module() -> None:
    module = small_cnn().eval()
    compiled = torch.compile(module, backend="eager")
    with served(module) as client:
        expected = client.attribute(batch(), method=sidelight.GuidedBackpropagation()).maps
    with served(compiled) as client:
        maps = client.attribute(batch(), method=sidelight.GuidedBackpropagation()).maps
    np.testing.assert_array_equal(maps, expected)
