"""The kernel's replica: it shares storage and does not change the caller's module."""

import copy
import threading

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from sidelight_server.compute.kernel import Kernel
from sidelight_server.compute.replica.replica import replicate
from sidelight_server.compute.staging import Staging, normalize
from sidelight_server.domain import ResolvedTarget, Score
from torch import nn

from support.models import small_cnn


def snapshot(module: nn.Module) -> dict[str, object]:
    """Return all state that a call could change."""
    return {
        "modes": [each.training for each in module.modules()],
        "requires_grad": [each.requires_grad for each in module.parameters()],
        "grads": [each.grad is None for each in module.parameters()],
        "devices": [each.device for each in module.parameters()],
        "pointers": [each.data_ptr() for each in module.state_dict().values()],
        "state": {name: value.clone() for name, value in module.state_dict().items()},
        "hooks": [len(each._forward_hooks) + len(each._backward_hooks) for each in module.modules()],
    }


def assert_undisturbed(module: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(module)
    states = before.pop("state"), after.pop("state")
    assert after == before
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=0)


def test_a_module_and_images_are_as_they_were_after_calls(device: str, floats: torch.Tensor) -> None:
    module = small_cnn().train()
    module[0].weight.requires_grad_(False)  # one parameter frozen by its owner, the others not
    before = snapshot(module)
    images, array = floats.clone().requires_grad_(), floats.numpy().copy()
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    kept = pixels.clone()
    spec = sidelight_server.ModelSpec(module, input_size=(3, 32, 32))
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        for given in (images, array, pixels):
            client.attribute(given)
    assert_undisturbed(module, before)
    assert images.requires_grad
    assert images.grad is None
    assert (array == floats.numpy()).all()
    assert torch.equal(images.detach(), floats)
    assert torch.equal(pixels, kept)


def test_a_module_in_training_mode_is_explained_in_eval_mode(device: str, floats: torch.Tensor) -> None:
    training, evaluating = small_cnn().train(), small_cnn().eval()
    with sidelight_server.serve(training, device=device) as address, sidelight.connect(address) as client:
        maps = client.attribute(floats).maps
    with sidelight_server.serve(evaluating, device=device) as address, sidelight.connect(address) as client:
        assert (client.attribute(floats).maps == maps).all()


def test_further_training_changes_the_next_map(floats: torch.Tensor) -> None:
    """The replica shares storage, BatchNorm statistics included. (On another device than the module's it cannot.)"""
    module = small_cnn()
    with sidelight_server.serve(module, device="cpu") as address, sidelight.connect(address) as client:
        before = client.attribute(floats).maps
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        module.train()(floats).square().mean().backward()
        optimiser.step()
        after = client.attribute(floats).maps
    assert not (after == before).all()
    with sidelight_server.serve(copy.deepcopy(module), device="cpu") as address, sidelight.connect(address) as client:
        assert (client.attribute(floats).maps == after).all()


def test_a_replica_shares_every_parameter_and_buffer() -> None:
    module = small_cnn()
    replica = replicate(module)
    for (name, ours), (_, theirs) in zip(replica.state_dict().items(), module.state_dict().items(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr(), name
    assert not any(each.requires_grad for each in replica.parameters())
    assert not any(each.training for each in replica.modules())


def test_tied_weights_stay_tied_in_a_replica() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    replica = replicate(nn.Sequential(first, second))
    assert replica[0].weight is replica[1].weight


def test_rows_of_different_scores_and_targets_run_together(device: str, floats: torch.Tensor) -> None:
    """One chunk has rows of different scores and targets; each row's gradient is that of the row alone."""
    kernel = Kernel(small_cnn().double(), device=torch.device(device))
    x = floats.double().to(device)
    resolved_targets = [ResolvedTarget(), ResolvedTarget(3), ResolvedTarget(), ResolvedTarget(7, 2), ResolvedTarget(0)]
    wanted = [Score.PROBABILITY, Score.LOGIT, Score.LOG_PROBABILITY, Score.PROBABILITY, Score.LOGIT]
    mixed = kernel.run(x, resolved_targets, wanted)
    for row in range(5):
        alone = kernel.run(x[row : row + 1], resolved_targets[row : row + 1], wanted[row : row + 1])
        # float64: another summation order moves the last bits alone.
        torch.testing.assert_close(mixed.gradients[row], alone.gradients[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mixed.scores[row], alone.scores[0], rtol=1e-12, atol=0)
        assert mixed.explained[row] == alone.explained[0]


def test_half_precision_modules_take_pixels_and_floats(device: str) -> None:
    spec = sidelight_server.ModelSpec(small_cnn().bfloat16(), input_size=(3, 32, 32))
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        answer = client.attribute(pixels)
        same = client.attribute(pixels.permute(0, 3, 1, 2).float() / 255)
    assert answer.provenance.precision == "bfloat16"
    np.testing.assert_array_equal(answer.maps, same.maps)


def test_pixels_are_normalised_as_plain_torch_would(device: str) -> None:
    pixels = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([127.0, 100.0, 0.0])[:, None, None], torch.tensor([128.0, 50.0, 255.0])[:, None, None]
    staged = Staging(torch.device(device)).to_device(list(pixels.numpy()), dtype=pixels.numpy().dtype)
    inputs = normalize(staged, mean.to(device), std.to(device))
    assert inputs.is_contiguous()
    torch.testing.assert_close(inputs.cpu(), (pixels.permute(0, 3, 1, 2).float() - mean) / std, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: {"near": x, "far": x}, r"returned dict of near \[2, 3, 8, 8\], far \[2, 3, 8, 8\]; set output"),
        (lambda x: x.flatten(), "returned"),
        (lambda x: torch.zeros(len(x), 4), "cannot be differentiated"),
    ],
    ids=["dict", "flat", "constant"],
)
def test_a_model_that_cannot_be_explained_is_refused_at_load(forward: object, message: str) -> None:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return forward(x)

    spec = sidelight_server.ModelSpec(Wrong(), input_size=(3, 8, 8))
    with pytest.raises(sidelight_server.ConfigurationError, match=message), sidelight_server.serve(spec):
        pass


class First(nn.Module):
    """A network that begins with a given operation."""

    def __init__(self, first: object) -> None:
        super().__init__()
        self.first = first
        self.inner = small_cnn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.first(x))


def subtract_in_place(x: torch.Tensor) -> torch.Tensor:
    x -= 0.5
    return x


@pytest.mark.parametrize("input_size", [(3, 32, 32), None], ids=["sized", "of any size"])
def test_a_model_that_begins_in_place_is_explained_like_one_that_does_not(
    input_size: tuple[int, int, int] | None, device: str, floats: torch.Tensor
) -> None:
    maps = []
    for first in (subtract_in_place, lambda x: x - 0.5):
        spec = sidelight_server.ModelSpec(First(first), input_size=input_size)
        with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
            maps += [client.attribute(floats).maps, client.attribute(floats).maps]
    for each in maps[1:]:
        np.testing.assert_array_equal(each, maps[0])


def test_a_model_whose_rows_touch_each_other_runs_them_alone(device: str, floats: torch.Tensor) -> None:
    """BatchNorm without running statistics normalizes by the batch: with neighbors, maps would be off by a quarter."""
    spec = sidelight_server.ModelSpec(First(nn.BatchNorm2d(3, track_running_stats=False)), input_size=(3, 32, 32))
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        together = client.attribute(floats).maps
        alone = np.concatenate([client.attribute(each).maps for each in floats])
    np.testing.assert_array_equal(together, alone)


def test_further_training_changes_the_digest(floats: torch.Tensor) -> None:
    module = small_cnn()
    with sidelight_server.serve(module, device="cpu") as address, sidelight.connect(address) as client:
        before = client.attribute(floats).provenance.model_digest
        assert client.attribute(floats).provenance.model_digest == before
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
        module.train()(floats).square().mean().backward()
        optimiser.step()
        after = client.attribute(floats).provenance.model_digest
    with sidelight_server.serve(module, device="cpu") as address, sidelight.connect(address) as client:
        assert client.attribute(floats).provenance.model_digest == after
    assert before != after


def test_a_float_beyond_the_models_type_is_the_callers_fault(device: str, floats: torch.Tensor) -> None:
    floats[1, 0, 0, 0] = 1e6
    with sidelight_server.serve(small_cnn().half(), device=device) as address, sidelight.connect(address) as client:
        answer = client.attribute(floats, on_error="return")
    (failure,) = answer.failures
    assert (failure.example, failure.code) == (1, 3)
    assert "65504" in failure.message


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: sidelight_server.ModelSpec(Locked()), "cannot be replicated"),
        (lambda: sidelight_server.ModelSpec(small_cnn(), input_size=(8, 8)), "input_size: got"),
        (lambda: sidelight_server.ModelSpec(small_cnn(), input_size=(3, 8, 8), mean=0.5), "mean: got 0.5"),
        (lambda: sidelight_server.ModelSpec(small_cnn(), output_kind="probs"), "output_kind: got 'probs'"),
        (lambda: sidelight_server.ModelSpec(small_cnn(), class_names=[1, 2]), "class_names: got 1: "),
        (lambda: sidelight_server.ModelSpec(small_cnn(), name=3), "name: got 3"),
        (lambda: small_cnn, "module: got function"),
    ],
    ids=["not copyable", "two sizes", "one mean", "outputs", "labels", "name", "no module"],
)
def test_a_wrong_specification_is_refused_with_a_message(spec: object, message: str, device: str) -> None:
    refused = pytest.raises(sidelight_server.ConfigurationError, match=message)
    with refused, sidelight_server.serve(spec(), device=device):
        pytest.fail("it has started")


def test_means_may_be_numbers_of_any_kind(device: str) -> None:
    spec = sidelight_server.ModelSpec(
        small_cnn(), input_size=(3, 32, 32), mean=torch.tensor([0.5, 0.5, 0.5]), std=np.float32([1, 1, 1])
    )
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        assert len(client.attribute(np.zeros((32, 32, 3), np.uint8))) == 1
