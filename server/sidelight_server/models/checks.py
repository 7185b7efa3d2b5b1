"""Checks at load: whether rows of a batch depend on each other, and whether gradients are those of the outputs.

What autograd recorded cannot tell: a detached tensor, a quantized operation or a rounded gate leaves no trace there. So
outputs are compared with outputs.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from .model import InTurn

# Of the largest output: matrix products of another number of rows add in another order. Of float32's 1.2e-7 that makes
# about 1e-6 in deep networks; eps ** (2/3) is 2.4e-5. Statistics of the batch move outputs by far more.
_COMPANY = ((2, 0), (3, 3), (8, 4))  # how many other rows, and the place of the one that is compared

# Along random directions the outputs' differences over a step, D, are compared with the gradient's products, P. A
# rectifier's kinks and a curve make D differ from P, and as much from the D of another step. Where both D agree with
# each other and not with P, a part of the gradient is missing. In 20 families of networks with random weights |D − P|
# was at most 2.6 times the difference of the two D; with gates rounded to 16 steps at least 3.4 times, as a rule 6.
RATIO = 3.0
DOUBT = 2.0  # of a ratio above this the mean with that of another point counts
LARGEST_RATIO = 10.0
AGREEMENT = 0.15  # of two D, relative, for them to say anything
LEAST_MISSING = 3e-3  # of the gradient's effect
LOOK_STEP = (
    0.03  # of inputs between 0 and 1; where D and P agree here, most networks without kinks, there is no more to do
)
COARSE_STEPS = (0.2, 0.1)  # what is rounded is rounded over these
FINE_STEP = 3e-3  # rectifiers hardly switch within so small a step
FINE_CHANGE = 1e-3  # of the outputs, at most
FEW_DIRECTIONS, MANY_DIRECTIONS = 3, 8
FEW_PIXELS = 128 * 128  # there are fewer kinks, and so more chance: more directions
ROWS = 2  # at once: nothing is known yet of the memory and the time that more would take
ROUNDINGS = 16.0  # what a network makes of one rounding of its type

Run = Callable[[Tensor], Tensor]


def is_batch_dependent(run: Run, example: Tensor, *, in_turn: "InTurn", most: int, dtype: torch.dtype) -> bool:
    """Return whether the outputs of an example, [1, C, H, W], depend on the rows beside it.

    `run` gives the outputs of inputs, [n, K] or [n, K, h, w]; `dtype` is what it computes in. The example runs alone,
    and beside 2, 3 and 8 others, of other spreads, in other places, but never more than `most` together. Raises what
    the module raises.
    """
    alone = in_turn(lambda: _forward(run, example))[0]
    tolerance = float(torch.finfo(dtype).eps ** (2 / 3) * alone.abs().max())
    for others, place in _COMPANY:
        if others < most:
            neighbors = noise(example.shape[1:], others + 1, seed=others).to(example)
            neighbors *= torch.linspace(0.5, 2, others + 1).to(neighbors).view(-1, 1, 1, 1)
            neighbors[place] = example[0]
            beside = in_turn(lambda neighbors=neighbors: _forward(run, neighbors))[place]  # type: ignore[misc]
            if float((beside - alone).abs().max()) > tolerance:
                return True
    return False


def _forward(run: Run, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return run(inputs).detach().clone()


def gradient_fault(run: Run, example: Tensor, *, in_turn: "InTurn", most: int = ROWS) -> str:
    """Return what is wrong with the gradient at an example, [1, C, H, W], in words; empty where nothing is.

    `ConfigurationError` where the outputs do not depend on the input at all. `most` is how
    many rows may run at once: one, where they depend on each other.
    """
    ratio, said = _judged(run, example, seed=0, in_turn=in_turn, most=most)
    if ratio > DOUBT:
        another = noise(example.shape[1:], 1, seed=100).to(example)
        again, _ = _judged(run, another, seed=1, in_turn=in_turn, most=most)
        ratio = (ratio + again) / 2
    return said if ratio > RATIO else ""


def _judged(run: Run, example: Tensor, *, seed: int, in_turn: "InTurn", most: int) -> tuple[float, str]:
    """Return how sure it is that the gradient at an example is not the outputs', as a ratio, and what to say then."""
    slope, size, has_graph = in_turn(lambda: _slope(run, example))
    directions = _directions(example, seed=seed)
    products = (slope.double() * directions.double()).flatten(1).sum(dim=1)  # [v]

    def differences(step: float, n: int | None = None) -> Tensor:
        points = example + step * torch.cat([directions[:n], -directions[:n]])
        parts = torch.split(points, most)
        values = [in_turn(lambda part=part: _weighted(_forward(run, part))) for part in parts]  # type: ignore[misc]
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
            said = f"its gradient differs by {missing:.1%} from how its outputs change: a part of it is missing, where "
            worst = min(LARGEST_RATIO, missing / unsure), said + "something is detached, quantized or rounded"
    return worst


def _share(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / torch.maximum(a.norm(), b.norm()).clamp_min(1e-300))


def _slope(run: Run, example: Tensor) -> tuple[Tensor, float, bool]:
    """Return the gradient of the weighted outputs, their size, and whether they have a graph to the input."""
    leaf = example.detach().clone().requires_grad_()
    # What torch warns of, operations without a gradient, is what is looked for.
    with torch.enable_grad(), warnings.catch_warnings(action="ignore", category=UserWarning):
        outputs = run(leaf)
        (slope,) = (
            torch.autograd.grad(_weighted(outputs).sum(), leaf, allow_unused=True) if outputs.requires_grad else (None,)
        )
    size = float(_weighted(outputs.detach().abs()).max())
    return torch.zeros_like(example) if slope is None else slope, size, slope is not None


def _weighted(outputs: Tensor) -> Tensor:
    """Return one number of each row, [n]: a weighted sum, for probabilities, all added, would always be 1."""
    flat = outputs.flatten(1).double()
    return flat @ torch.linspace(1, 2, flat.shape[1], dtype=flat.dtype, device=flat.device)


def _directions(example: Tensor, *, seed: int) -> Tensor:
    """Return random directions, [v, C, H, W], rough and smooth: some networks answer to the one, some to the other."""
    generator = torch.Generator().manual_seed(seed)
    n_pixels = example.shape[-1] * example.shape[-2]
    shape = (MANY_DIRECTIONS if n_pixels < FEW_PIXELS else FEW_DIRECTIONS, *example.shape[1:])
    coarse = torch.randn((*shape[:2], 4, 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, shape[2:], mode="bilinear")
    return (0.5 * torch.randn(shape, generator=generator) + smooth).to(example)


def noise(shape: Sequence[int], n: int, *, seed: int = 0) -> Tensor:
    """Return n random inputs of a shape, [n, C, H, W], between 0 and 1."""
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed))
