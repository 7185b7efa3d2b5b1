"""Perturbation methods: occlusion compared with Captum's, RISE with masks made by scikit-image. In float64."""

from collections.abc import Iterator
from math import ceil

import numpy as np
import pytest
import torch
from captum.attr import Occlusion as CaptumOcclusion
from sidelight_server import RISE, Channels, Constant, Given, Occlusion, Score
from sidelight_server.methods import random
from skimage.transform import resize
from torch import Tensor, nn

from support.engines import Explain, assert_close, explaining

CLASS = 2
SHAPE = (2, 9, 13)
WINDOWS = {
    "one pixel": ((1, 1), (1, 1)),
    "beside each other": ((3, 13), (3, 13)),
    "overlapping": ((4, 5), (2, 3)),
    "over both edges": ((4, 6), (3, 5)),
    "all but one row": ((8, 13), (8, 1)),
    "the whole": ((9, 13), (9, 13)),
}


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 7 * 11, 5)).double()


@pytest.fixture(scope="module")
def explain(module: nn.Module) -> Iterator[Explain]:
    with explaining(module, input_size=SHAPE) as explain:
        yield explain


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("baseline", ["zero", "constant", "one for all", "one for each"])
def test_occlusion_is_captums(window: str, baseline: str, module: nn.Module, explain: Explain, x: Tensor) -> None:
    other = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    ours, theirs = {
        "zero": (Constant(), 0.0),
        "constant": (Constant(0.4), 0.4),
        "one for all": (Given(other[0].numpy()), other[:1]),
        "one for each": (Given(other.numpy()), other),
    }[baseline]
    size, stride = WINDOWS[window]
    expected = CaptumOcclusion(module).attribute(
        x, (SHAPE[0], *size), strides=(SHAPE[0], *stride), baselines=theirs, target=CLASS
    )
    answer = explain(x, Occlusion(size, stride, ours), target=CLASS)
    assert_close(answer.maps, expected)  # each channel of it is the same, as with a window over all of them
    n_windows = (ceil((9 - size[0]) / stride[0]) + 1) * (ceil((13 - size[1]) / stride[1]) + 1)
    assert [each.convergence.rows for each in answer.explanations] == [1 + n_windows] * 3


def test_occlusion_of_a_probability_is_captums(module: nn.Module, explain: Explain, x: Tensor) -> None:
    expected = CaptumOcclusion(lambda x: module(x).softmax(dim=1)).attribute(x, (2, 3, 4), strides=(2, 2, 3), target=1)
    maps = explain(x, Occlusion((3, 4), (2, 3)), target=1, score=Score.PROBABILITY, channels=Channels.MAX_ABS).maps
    assert_close(maps, expected[:, 0])


def test_windows_without_a_stride_stand_beside_each_other(explain: Explain, x: Tensor) -> None:
    without, given = (explain(x, Occlusion((3, 4), stride)).maps for stride in (None, (3, 4)))
    np.testing.assert_array_equal(without, given)


def test_occlusion_of_a_linear_logit_is_what_a_window_hides_over_how_often(x: Tensor) -> None:
    torch.manual_seed(8)
    module = nn.Sequential(nn.Flatten(), nn.Linear(2 * 9 * 13, 5)).double()
    part = (module[1].weight[CLASS].detach().view(SHAPE) * (x - 0.3)).sum(dim=1).numpy()  # [n, H, W]
    fall, cover = np.zeros_like(part), np.zeros(SHAPE[1:])
    for top in (0, 3, 6):  # windows of 4 × 5 by 3 × 4: the last of them below reaches over the edge
        for left in (0, 4, 8):
            rows, columns = slice(top, top + 4), slice(left, left + 5)
            fall[:, rows, columns] += part[:, rows, columns].sum(axis=(1, 2), keepdims=True)
            cover[rows, columns] += 1
    with explaining(module) as explain:
        maps = explain(x, Occlusion((4, 5), (3, 4), Constant(0.3)), target=CLASS, channels=Channels.SUM).maps
    assert_close(maps, fall / cover)


def masks_of(method: RISE, shape: tuple[int, int]) -> np.ndarray:
    """Return the masks, [n, H, W], from the same grids, enlarged by scikit-image as the paper's authors did."""
    masks = []
    for k in range(method.masks):
        chosen = random.generator(method.seed, "rise", k, device=torch.device("cpu"))
        grid = torch.rand(method.cells, method.cells, generator=chosen).numpy() < method.keep_probability
        cell = [ceil(length / method.cells) for length in shape]
        size = [(method.cells + 1) * length for length in cell]
        large = resize(grid.astype(float), size, order=1, mode="edge", anti_aliasing=False)
        top, left = (int(torch.randint(length, (), generator=chosen)) for length in cell)
        masks.append(large[top : top + shape[0], left : left + shape[1]])
    return np.stack(masks)


@pytest.mark.parametrize("cells", [1, 3, 7])
@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_rise_is_the_masks_of_scikit_image_each_times_its_score(
    cells: int, keep: float, module: nn.Module, explain: Explain, x: Tensor
) -> None:
    method = RISE(masks=40, cells=cells, keep_probability=keep, seed=9)
    masks = torch.from_numpy(masks_of(method, SHAPE[1:]))
    expected = []
    for each in x:
        with torch.no_grad():
            scores = module(each * masks[:, None]).softmax(dim=1)[:, CLASS]
        expected.append((scores[:, None, None] * masks).sum(dim=0) / (40 * keep))
    answer = explain(x, method, target=CLASS, score=Score.PROBABILITY, channels=Channels.SUM)
    assert_close(answer.maps, torch.stack(expected))
    assert [each.convergence.rows for each in answer.explanations] == [41] * 3


@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_the_rise_of_a_constant_score_is_that_score_everywhere(keep: float, x: Tensor) -> None:
    """This shows whether all pixels are kept equally often, and as often as the method expects."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(2 * 9 * 13, 5)).double()
    nn.init.zeros_(module[1].weight)
    nn.init.constant_(module[1].bias, 2.0)
    n = 2000
    with explaining(module) as explain:
        maps = explain(x[:1], RISE(n, cells=4, keep_probability=keep), target=CLASS, channels=Channels.SUM).maps
    # A mask's value has mean p and at most the variance p (1 − p) of its cells: 5 standard errors, for 117 pixels.
    np.testing.assert_allclose(maps, 2.0, rtol=0, atol=2.0 * 5 * np.sqrt((1 - keep) / (keep * n)))
