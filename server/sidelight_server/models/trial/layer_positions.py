"""The positions of layers: where a layer's output changes if half of the input does."""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...compute.passes.layers import Layout, Size, first_tensor, grids
from ...telemetry.logs import Event
from .layer_trace import hooked_layers

log = logging.getLogger("sidelight")

MAX_EXTRA_TOKENS = 16  # tokens without a position: class and distillation tokens, registers
MAX_ROUNDS = 12  # trial passes; the first one is that of introspection
CERTAIN = 0.9  # agreement above which no further round is needed
AGREEMENT = 0.75  # least agreement for a layout; a layer without positions has 0.5
ENOUGH = 32  # rows and columns to compare; larger grids are pooled
LONG = 2  # aspect ratio of the input from which a layer may have a single row or column

Call = Callable[[nn.Module, Tensor], object]


class Positions:
    """Finds each layer's layout: half of the input is replaced in turn, to see which positions of the output change.

    This is repeated with other inputs until the layouts are certain.
    """

    def __init__(self, values: Mapping[str, Tensor], size: Size) -> None:
        self._values = values  # the layers' outputs for the trial
        self._watched = set(values)
        self._size = size
        self._changes: dict[str, list[Tensor]] = {}  # squared, summed over rounds and each possible channel axis

    def find(
        self, module: nn.Module, call: Call, trial: Tensor, *, together: int, until: Sequence[str]
    ) -> dict[str, Layout]:
        """Return the layouts found, after as many rounds as the layers in `until` need."""
        least, most = float(trial.min()), float(trial.max())
        generator = torch.Generator().manual_seed(0)
        is_pair = together > 1 and len(trial) > 1 and not torch.equal(trial[0], trial[1])
        for number in range(MAX_ROUNDS):
            first, second = trial[:1], trial[1:2]
            if number or not is_pair:
                noise = torch.rand((2, *trial.shape[1:]), generator=generator).to(trial)
                first, second = (least + ((most - least) or 1.0) * noise).chunk(2)
            try:
                self._look(module, call, first, second, together=together, is_known=is_pair and not number)
            except Exception as error:  # of the module: use earlier rounds
                log.warning(Event("layers_unseen", message=f"{type(error).__name__}: {error}"))
                break
            # Continue for layers after the last certain one, which may be the default. Others need only one round.
            judged = [(name, *self._judge(name)) for name in reversed(until)]
            with_positions = ((name, agreement) for name, best, agreement in judged if best)
            self._watched = {name for name, _ in itertools.takewhile(lambda each: each[1] < CERTAIN, with_positions)}
            if not self._watched:
                break
        shown = {name: self._judge(name) for name in self._changes}
        return {name: best for name, (best, agreement) in shown.items() if best and agreement >= AGREEMENT}

    def _look(
        self, module: nn.Module, call: Call, first: Tensor, second: Tensor, *, together: int, is_known: bool
    ) -> None:
        """Add the changes if half of an example is replaced by that of another: top, bottom, left and right."""
        rows, columns = ((length + 1) // 2 for length in first.shape[2:])
        above = torch.cat([second[..., :rows, :], first[..., rows:, :]], dim=2)
        left = torch.cat([second[..., :columns], first[..., columns:]], dim=3)
        points = torch.cat([above, left] if is_known else [first, second, above, left])
        returned = {name: [*(self._values[name][:2] if is_known else ())] for name in self._watched}
        for part in torch.split(points, together):

            def see(name: str, given: object, n: int = len(part)) -> object:
                value = first_tensor(given)
                if name in returned and value is not None:
                    returned[name] += value[:n].clone()  # a copy: the next module may change it in place
                    if len(returned[name]) == 4:
                        self._add(name, *returned.pop(name))
                return given

            with torch.no_grad(), hooked_layers(module, see):
                call(module, part.clone())

    def _add(self, name: str, first: Tensor, second: Tensor, above: Tensor, left: Tensor) -> None:
        changed = torch.stack([above - first, above - second, left - first, left - second]).float().square()
        sums = [changed.sum(dim=axis).double().cpu() for axis in ((1, 3) if changed.ndim == 4 else (2,))]
        before = self._changes.get(name) or [torch.zeros_like(each) for each in sums]
        self._changes[name] = [a + b for a, b in zip(before, sums, strict=True)]

    def _judge(self, name: str) -> tuple[Layout | None, float]:
        """Return the layout that fits a layer best, and its agreement."""
        changes, size = self._changes.get(name), self._size
        if not changes:
            return None, 0.0
        if len(changes) == 2:  # [4, h, w] and [4, h, w]
            read = {Layout("nchw"): changes[0], Layout("nhwc"): changes[1]}
        else:
            tokens = changes[0]  # [4, T]
            read = {
                Layout("tokens", prefix, extra - prefix, grid, size): part.reshape(4, *grid)  # [4, h, w]
                for extra in range(MAX_EXTRA_TOKENS + 1)
                for grid in grids(tokens.shape[1] - extra, size)
                for prefix in sorted({0, max(0, extra - 1), extra})  # extra tokens: all, or all but one, on one side
                for part in [tokens[:, prefix : prefix + math.prod(grid)]]
            }
        judged = {
            each: _agreement(values)
            for each, values in read.items()
            if _is_grid(values.shape[1], values.shape[2], size)
        }
        best = max(judged, key=lambda each: judged[each][1], default=None)
        return best, judged[best][0] if best else 0.0


def _is_grid(height: int, width: int, size: Size) -> bool:
    """Return whether a grid is plausible for an input size: a single row only for a wide input."""
    return height * width > 1 and (height > 1 or size[1] >= LONG * size[0]) and (width > 1 or size[0] >= LONG * size[1])


def _agreement(change: Tensor) -> tuple[float, float]:
    """Return the agreement of positions with the halves that they are in, and the margin, for changes [4, h, w].

    The agreement is the probability that a position in one half changes more with that half than a position in the
    other half does: the lower one of rows and columns.
    """
    # Pooled: more positions take long to sort and add no information.
    sides = min(change.shape[1], ENOUGH), min(change.shape[2], ENOUGH)
    above, below, left, right = nn.functional.adaptive_avg_pool2d(change, sides)
    judged = [_halves(above, below), _halves(left.T, right.T)]
    agreements, margins = zip(*(each for each in judged if each is not None), strict=True)
    return min(agreements), sum(margins)


def _halves(first: Tensor, second: Tensor) -> tuple[float, float] | None:
    """Return agreement and margin along the first axis, for changes [a, b] of the first and of the second half."""
    half = len(first) // 2  # the middle of an odd number belongs to neither half
    if not half:
        return None
    share = first / (first + second)  # NaN where nothing changes
    ahead, behind = (part[part.isfinite()] for part in (share[:half], share[len(share) - half :]))
    if not len(ahead) or not len(behind):
        return 0.0, 0.0
    n_less = torch.searchsorted(behind.sort().values, ahead)  # for each in `ahead`, how many in `behind` are less
    return float(n_less.double().mean()) / len(behind), float(ahead.mean() - behind.mean())
