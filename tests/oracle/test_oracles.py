"""Maps compared with other libraries and closed forms, through a real server and a real client.

On the CPU in float32 they are equal to the last bit while a batch fits one chunk: the same operations run in the same
order. On a GPU other algorithms may be chosen for another chunk, so a share of the map's maximum is allowed: 1e-4 is
what cuDNN's choice of convolution was seen to move in float32 without TF32, with room.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from captum.attr import InputXGradient, Saliency
from captum.testing.helpers.basic_models import BasicModel_ConvNet_One_Conv
from sidelight_server.models.sources.demo import efficientnet_lite0
from torch import Tensor, nn

from support import ROOT, TESTS
from support.models import Linear, small_cnn
from support.tolerances import GPU

Explain = Callable[..., sidelight.Attribution]


@pytest.fixture
def explain(device: str) -> Iterator[Callable[[nn.Module], Explain]]:
    """Serve a module for the length of a test, and return a function that explains a batch by it."""
    with contextlib.ExitStack() as stack:

        def serving(module: nn.Module, **settings: object) -> Explain:
            address = stack.enter_context(sidelight_server.serve(module, device=device, **settings))
            client = stack.enter_context(sidelight.connect(address, connect_timeout=10))
            return client.attribute

        yield serving


def assert_equal(maps: np.ndarray, expected: Tensor, device: str) -> None:
    assert maps.dtype == np.float32
    assert maps.shape == tuple(expected.shape)
    if device == "cpu":
        np.testing.assert_array_equal(maps, expected.numpy())
    else:
        atol = GPU * float(expected.abs().max()) if expected.numel() else 0
        np.testing.assert_allclose(maps, expected.numpy(), rtol=0, atol=atol)


def captum_saliency(module: nn.Module, x: Tensor, target: Tensor | None = None) -> Tensor:
    """Return Captum's saliency of the probability, the largest over the channels: [N, H, W]."""
    module = module.eval()

    def probability(x: Tensor) -> Tensor:
        return module(x).softmax(dim=1)

    if target is None:
        with torch.no_grad():
            target = module(x).argmax(dim=1)
    return Saliency(probability).attribute(x.clone().requires_grad_(), target=target).amax(dim=1).detach()


NETS = {
    "linear": lambda: (Linear(shape=(3, 4, 5)), (3, 4, 5)),
    "one-conv": lambda: (BasicModel_ConvNet_One_Conv(), (1, 4, 4)),
    "cnn-1-channel": lambda: (small_cnn(1), (1, 32, 32)),
    "cnn-3-channels": lambda: (small_cnn(3), (3, 32, 32)),
    "cnn-4-channels": lambda: (small_cnn(4), (4, 32, 32)),
    "efficientnet-lite0": lambda: (efficientnet_lite0().module, (3, 224, 224)),
}


@pytest.mark.parametrize("net", NETS)
def test_maps_are_equal_to_captums(net: str, explain: Callable[..., Explain], device: str) -> None:
    module, shape = NETS[net]()
    attribute = explain(module)
    for n in (1, 5):
        x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
        answer = attribute(x)
        assert_equal(answer.maps, captum_saliency(module, x), device)
    assert attribute(torch.empty(0, *shape)).maps.shape == (0, *shape[1:])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_maps_of_a_given_class_are_equal_to_captums(
    channels: int, explain: Callable[..., Explain], device: str
) -> None:
    module = small_cnn(channels)
    x = torch.randn(6, channels, 32, 32, generator=torch.Generator().manual_seed(3))
    targets = [0, 9, 4, 4, 7, 2]
    attribute = explain(module)
    assert_equal(attribute(x, target=targets).maps, captum_saliency(module, x, torch.tensor(targets)), device)
    assert_equal(attribute(x, target=3).maps, captum_saliency(module, x, torch.full((6,), 3)), device)


def test_signed_unreduced_maps_of_logits_are_equal_to_captums(explain: Callable[..., Explain], device: str) -> None:
    module = small_cnn().eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    answer = explain(module)(x, target=1, score="logit", channels="none")
    assert_equal(answer.maps, Saliency(module).attribute(x.requires_grad_(), target=1, abs=False).detach(), device)


def test_gradient_times_input_is_equal_to_captums(explain: Callable[..., Explain], device: str) -> None:
    module = small_cnn().eval()
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    method = sidelight.Gradient(times_input=True)
    answer = explain(module)(x, target=1, score="logit", channels="none", method=method)
    assert_equal(answer.maps, InputXGradient(module).attribute(x.requires_grad_(), target=1).detach(), device)


def test_the_one_conv_fixture_gives_the_map_that_was_computed_by_hand(explain: Callable[..., Explain]) -> None:
    ramp = torch.arange(1.0, 17.0).view(1, 1, 4, 4)
    answer = explain(BasicModel_ConvNet_One_Conv())(ramp, target=0, score="logit")
    assert answer.maps[0].tolist() == [[1, 2, 2, 1], [1, 2, 2, 1], [1, 2, 2, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("target", [None, 6], ids=["predicted", "class 6"])
def test_a_linear_softmax_has_its_closed_form(target: int | None, explain: Callable[..., Explain]) -> None:
    module = Linear(shape=(3, 4, 5)).double()
    x = torch.randn(5, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    answer = explain(module)(x, target=target)
    weight = module.linear.weight.detach()  # [K, C·H·W]
    probability = module(x).detach().softmax(dim=1)  # [N, K]
    k = probability.argmax(dim=1) if target is None else torch.full((5,), target)
    p_k = probability.gather(1, k[:, None])
    gradient = (p_k * (weight[k] - probability @ weight)).view(5, 3, 4, 5)
    # Computed in float64, sent in float32: half a unit in the last place is 6e-8 of the value.
    np.testing.assert_allclose(answer.maps, gradient.abs().amax(dim=1), rtol=1e-7, atol=0)
    assert [each.index for each in answer.targets] == k.tolist()
    np.testing.assert_allclose([each.score for each in answer.targets], p_k[:, 0], rtol=1e-12)


@pytest.mark.parametrize("score", ["probability", "logit", "log_probability"])
def test_the_gradient_is_the_limit_of_finite_differences(score: str, explain: Callable[..., Explain]) -> None:
    module = small_cnn(2, size=8, seed=2).double().eval()
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    of = {"probability": lambda z: z.softmax(1), "logit": lambda z: z, "log_probability": lambda z: z.log_softmax(1)}
    step = 1e-6
    steps = torch.eye(x.numel(), dtype=torch.float64).view(-1, *x.shape[1:]) * step
    with torch.no_grad():
        up, down = (of[score](module(x + sign * steps))[:, 3] for sign in (1, -1))
    expected = ((up - down) / (2 * step)).view(x.shape)
    maps = explain(module)(x, target=3, score=score, channels="none").maps
    # Central differences of float64 at 1e-6 are good to about 1e-9 of the score; float32 on the wire to 6e-8.
    np.testing.assert_allclose(maps, expected, rtol=1e-5, atol=2e-9 * float(expected.abs().max()) / step * 1e-3)


def test_probabilities_without_logits_give_the_same_map(explain: Callable[..., Explain], device: str) -> None:
    module = nn.Sequential(small_cnn(), nn.Softmax(dim=1))
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    assert_equal(explain(module, output_kind="probabilities")(x).maps, captum_saliency(module[0], x), device)


def test_a_constant_added_to_all_logits_changes_no_probability_map(explain: Callable[..., Explain]) -> None:
    class Shifted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 5.0

    module = small_cnn().double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    plain, shifted = explain(module)(x).maps, explain(Shifted(module))(x).maps
    # Softmax of z + 5 rounds elsewhere in float64, about 1e-15; one unit of the float32 map may tip over: 1.2e-7.
    np.testing.assert_allclose(shifted, plain, rtol=2e-7, atol=0)


def test_permuting_a_batch_permutes_its_maps(explain: Callable[..., Explain], floats: Tensor, device: str) -> None:
    attribute = explain(small_cnn())
    order = [3, 0, 4, 2, 1]
    whole, permuted = attribute(floats).maps, attribute(floats[order]).maps
    # An example's place in a chunk may choose another summation: about 1e-6 of the maximum, as documented.
    share = 1e-6 if device == "cpu" else GPU
    np.testing.assert_allclose(permuted, whole[order], rtol=0, atol=share * whole.max())


@pytest.mark.parametrize("channels", ["sum", "mean_abs", "l2", "max_abs"])
@pytest.mark.parametrize("signed", [False, True], ids=["absolute", "signed"])
def test_channel_reductions_follow_their_definitions(
    channels: str, signed: bool, explain: Callable[..., Explain], floats: Tensor
) -> None:
    attribute = explain(small_cnn())
    raw = attribute(floats, channels="none").maps.astype(np.float64)
    largest = np.take_along_axis(raw, np.abs(raw).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    expected = {
        "sum": raw.sum(axis=1) if signed else np.abs(raw).sum(axis=1),
        "mean_abs": np.abs(raw).mean(axis=1),
        "l2": np.sqrt((raw**2).sum(axis=1)),
        "max_abs": largest if signed else np.abs(largest),
    }[channels]
    maps = attribute(floats, channels=channels, method=sidelight.Gradient(signed=signed)).maps
    # Three float32 terms: a few units in the last place of the largest.
    np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-6 * np.abs(raw).max())


OF_THE_ORIGINAL = ["linear", "cnn-1-channel", "cnn-3-channels", "cnn-4-channels", "efficientnet-lite0"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each network: its module, images and the original's maps of them."""
    folders = {net: tmp_path_factory.mktemp(net) for net in OF_THE_ORIGINAL}
    for net, folder in folders.items():
        module, shape = NETS[net]()
        torch.save(module, folder / "module.pt")
        torch.save(torch.randn(4, *shape, generator=torch.Generator().manual_seed(10)), folder / "images.pt")
    # The original needs stand-ins for the rest of its package, so it runs in a process of its own.
    subprocess.run(
        [sys.executable, "-m", "benchmarks.support.original", *folders.values()],
        check=True,
        timeout=100,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    return folders


@pytest.mark.parametrize("net", OF_THE_ORIGINAL)
def test_maps_are_equal_to_the_originals(
    net: str, originals: dict[str, Path], explain: Callable[..., Explain], device: str
) -> None:
    module = torch.load(originals[net] / "module.pt", weights_only=False)
    maps = explain(module)(torch.load(originals[net] / "images.pt")).maps
    assert_equal(maps, torch.from_numpy(np.load(originals[net] / "maps.npy")), device)
