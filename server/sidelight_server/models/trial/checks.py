"""Checks at load: whether the rows of a batch depend on each other, and whether gradients match the outputs.

The autograd graph does not show a detached tensor, a quantized operation or a rounded gate, so these checks compare
the outputs of several passes.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import ConfigurationError
from .in_turn import InTurn

# The tolerance is eps ** (2/3) of the largest output, 2.4e-5 in float32: matrix products of another number of rows sum
# in another order, which changes outputs by about 1e-6 in deep networks. Batch statistics change them by far more.
_NEIGHBORS = ((2, 0), (3, 3), (8, 4))  # number of other rows, and the index of the compared row

# Along random directions, the difference quotient of the outputs, D, is compared with the directional derivative from
# the gradient, P. Kinks of ReLUs and curvature make D differ from P, but equally from the D of another step. If both D
# agree with each other and not with P, a part of the gradient is missing. In 20 families of networks with random
# weights |D − P| was at most 2.6 times the difference of the two D; with gates rounded to 16 steps at least 3.4 times,
# usually 6.
RATIO = 3.0
DOUBT = 2.0  # above this ratio a second point is checked, and the mean counts
LARGEST_RATIO = 10.0
AGREEMENT = 0.15  # relative difference of two D below which they are conclusive
LEAST_MISSING = 3e-3  # differences of D and P below this share are ignored
# For inputs between 0 and 1. If D and P agree over this step, as for most networks without kinks, the check ends here.
LOOK_STEP = 0.03
COARSE_STEPS = (0.2, 0.1)  # large enough to average over rounded values
FINE_STEP = 3e-3  # ReLUs rarely switch within so small a step
FINE_CHANGE = 1e-3  # largest relative change of the outputs over the fine step
FEW_DIRECTIONS, MANY_DIRECTIONS = 3, 8
FEW_PIXELS = 128 * 128  # smaller inputs have fewer kinks, so more variance: more directions are needed
ROWS = 2  # rows at once: memory and time of more rows are not known yet
ROUNDINGS = 16.0  # rounding error of a network's outputs, in steps of its type

Run = Callable[[Tensor], Tensor]


def is_batch_dependent(run: Run, example: Tensor, *, in_turn: InTurn, most: int, dtype: torch.dtype) -> bool:
    """Return whether the outputs of an example, [1, C, H, W], depend on the other rows.

    `run` computes the outputs, [n, K] or [n, K, h, w], in the type `dtype`. The example runs alone and with 2, 3 and 8
    other rows of different spread, at different indices, but with at most `most` rows. Raises what the module raises.
    """
    alone = in_turn(lambda: _forward(run, example))[0]
    tolerance = float(torch.finfo(dtype).eps ** (2 / 3) * alone.abs().max())
    for others, index in _NEIGHBORS:
        if others < most:
            neighbors = noise(example.shape[1:], others + 1, seed=others).to(example)
            neighbors *= torch.linspace(0.5, 2, others + 1).to(neighbors).view(-1, 1, 1, 1)
            neighbors[index] = example[0]
            beside = in_turn(lambda neighbors=neighbors: _forward(run, neighbors))[index]  # type: ignore[misc]
            if float((beside - alone).abs().max()) > tolerance:
                return True
    return False


def _forward(run: Run, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return run(inputs).detach().clone()


def gradient_fault(run: Run, example: Tensor, *, in_turn: InTurn, most: int = ROWS) -> str:
    """Return a description of what is wrong with the gradient at an example, [1, C, H, W]; empty if it is right.

    Raises `ConfigurationError` if the outputs do not depend on the input. `most` is the number of rows that may run at
    once: 1 if rows depend on each other.
    """
    ratio, fault = _judge(run, example, seed=0, in_turn=in_turn, most=most)
    if ratio > DOUBT:
        another = noise(example.shape[1:], 1, seed=100).to(example)
        again, _ = _judge(run, another, seed=1, in_turn=in_turn, most=most)
        ratio = (ratio + again) / 2
    return fault if ratio > RATIO else ""


def _judge(run: Run, example: Tensor, *, seed: int, in_turn: InTurn, most: int) -> tuple[float, str]:
    """Return the ratio that is compared with `RATIO`, and a description of the fault."""
    gradient, size, has_graph = in_turn(lambda: _gradient(run, example))
    directions = _directions(example, seed=seed)
    products = (gradient.double() * directions.double()).flatten(1).sum(dim=1)  # [v]

    def differences(step: float, n: int | None = None) -> Tensor:
        points = example + step * torch.cat([directions[:n], -directions[:n]])
        parts = torch.split(points, most)
        values = [in_turn(lambda part=part: _weigh(_forward(run, part))) for part in parts]  # type: ignore[misc]
        ahead, behind = torch.cat(values).chunk(2)
        return (ahead - behind) / (2 * step)

    rounding = ROUNDINGS * torch.finfo(example.dtype).eps * size
    if not float(products.norm()):
        moved = float(differences(COARSE_STEPS[0]).norm()) * COARSE_STEPS[0]
        if not has_graph and moved == 0:
            raise ConfigurationError("it cannot be differentiated: its outputs do not depend on its input")
        why = "its gradient is zero although its outputs change: they are quantized, rounded or detached"
        return (LARGEST_RATIO if moved > rounding else 0.0), why
    if _share(differences(LOOK_STEP, FEW_DIRECTIONS), products[:FEW_DIRECTIONS]) <= LEAST_MISSING:
        return 0.0, ""
    fine = min(FINE_STEP, FINE_CHANGE * size / float(products.norm()))
    worst = 0.0, ""
    for first_step, step in (COARSE_STEPS, (fine, fine / 10)):
        first, second = differences(first_step), differences(step)
        apart = _share(first, second)
        missing = min(_share(first, products), _share(second, products))
        unsure = max(apart, rounding / step / float(torch.maximum(second.norm(), products.norm())), 1e-9)
        if apart < AGREEMENT and missing > LEAST_MISSING and missing / unsure > worst[0]:
            fault = f"its gradient differs by {missing:.1%} from how its outputs change: a part of it is missing, "
            worst = min(LARGEST_RATIO, missing / unsure), fault + "where something is detached, quantized or rounded"
    return worst


def _share(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / torch.maximum(a.norm(), b.norm()).clamp_min(1e-300))


def _gradient(run: Run, example: Tensor) -> tuple[Tensor, float, bool]:
    """Return the gradient of the weighted outputs, their size, and whether they have a graph to the input."""
    leaf = example.detach().clone().requires_grad_()
    # Suppress torch's warnings about operations without a gradient: this check looks for them.
    with torch.enable_grad(), warnings.catch_warnings(action="ignore", category=UserWarning):
        outputs = run(leaf)
        (gradient,) = (
            torch.autograd.grad(_weigh(outputs).sum(), leaf, allow_unused=True) if outputs.requires_grad else (None,)
        )
    size = float(_weigh(outputs.detach().abs()).max())
    return torch.zeros_like(example) if gradient is None else gradient, size, gradient is not None


def _weigh(outputs: Tensor) -> Tensor:
    """Return a weighted sum of each row's outputs, [n]: an unweighted sum of probabilities is always 1."""
    flat = outputs.flatten(1).double()
    return flat @ torch.linspace(1, 2, flat.shape[1], dtype=flat.dtype, device=flat.device)


def _directions(example: Tensor, *, seed: int) -> Tensor:
    """Return random directions, [v, C, H, W], both rough and smooth: networks may respond to only one kind."""
    generator = torch.Generator().manual_seed(seed)
    n_pixels = example.shape[-1] * example.shape[-2]
    shape = (MANY_DIRECTIONS if n_pixels < FEW_PIXELS else FEW_DIRECTIONS, *example.shape[1:])
    coarse = torch.randn((*shape[:2], 4, 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear")
    return (0.5 * torch.randn(shape, generator=generator) + smooth).to(example)


def noise(shape: Sequence[int], n: int, *, seed: int = 0) -> Tensor:
    """Return n random inputs of a shape, [n, C, H, W], between 0 and 1."""
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed))
