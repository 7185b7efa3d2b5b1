"""An example run: one example in progress, as its method's suspended generator and the current sweep."""

import math
from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..domain import Array, Convergence, Dense, ExplainedTarget, Request, ResolvedTarget, Target
from ..errors import Internal, InvalidArgument, SidelightError
from ..methods.method import Example, HostMaps, Improved, Outcome, RowOutput, Sweep, evaluate
from ..models.model import Model
from .preparation.examples import Prepared, not_dense

# For inputs up to this, an output that is not finite is the model's fault: float32 can hold the square.
LARGEST_INPUT = 1e18


@dataclass(slots=True, eq=False)
class Row:
    """One example at one point: the unit of work."""

    example_run: "ExampleRun"
    sweep: Sweep
    index: int


@dataclass(slots=True, eq=False)
class Result:
    """The result of an example run."""

    # Whether each map is only rounding errors; None if the method does not tell: then only an all-zero map counts.
    is_negligible: tuple[bool | None, ...]
    # On the device: [H, W], or [C, H, W] without channel reduction; one per explained class. Or already on the host.
    maps: tuple[Tensor, ...] | HostMaps
    targets: tuple[ExplainedTarget, ...]
    predicted: int
    probability: float
    probabilities: Tensor  # [K]
    convergence: Convergence | None = None
    is_exact: bool = False  # whether the maps stay float64 instead of becoming float32
    is_final: bool = True


class ExampleRun:
    """One example of a request, explained step by step on the thread that owns the device.

    After an exception from `fold` the run cannot continue: call `close`.
    """

    def __init__(self, request: Request, model: Model, prepared: Prepared, index: int, *, is_watched: bool) -> None:
        example = prepared.examples[index]
        if isinstance(example, Exception):
            raise TypeError("an example that failed has no example run")
        self.index = index
        self.example: Array = example
        self.resolved: ResolvedTarget = prepared.resolved_targets[index]
        self.result: Result | None = None  # the newest result; the device worker takes and clears it
        self._request = request
        self._model = model
        self._prepared = prepared
        self._is_watched = is_watched and not prepared.top_k
        self._n_rows = 0
        self._n_gradients = self._n_dead = 0  # rows with a gradient, for the current class
        self._n_taken = self._n_folded = 0
        self._steps = self._explain()
        self._sweep: Sweep | None = None
        self._advance()

    @property
    def is_over(self) -> bool:
        """Whether the run has ended and needs no more rows."""
        return self._sweep is None

    @property
    def pending(self) -> int:
        return self._sweep.count - self._n_taken if self._sweep else 0

    @property
    def wants_gradient(self) -> bool:
        return self._sweep is not None and self._sweep.gradient

    def take(self) -> Row:
        """Return the next row. Called only while `pending`."""
        assert self._sweep is not None  # noqa: S101
        self._n_taken += 1
        return Row(self, self._sweep, self._n_taken - 1)

    def fold(self, row: Row, output: RowOutput) -> None:
        """Fold the output of a row; after the sweep's last row, resume the method."""
        if self.is_over:
            return
        if not (math.isfinite(output.score) and math.isfinite(output.probability)):
            raise self.not_finite(output.input)
        self._n_rows += 1
        self._n_gradients += row.sweep.gradient
        self._n_dead += row.sweep.gradient and output.is_dead
        row.sweep.fold(row.index, output)
        self._n_folded += 1
        if self._n_folded == row.sweep.count:
            self._advance()

    def not_finite(self, point: Tensor | None = None) -> SidelightError:
        """Return the error for a number that is not finite, at a point, [C, H, W], or in the map if None.

        `InvalidArgument` if the input is beyond `LARGEST_INPUT`, else `Internal`: the model's fault.
        """
        at = torch.as_tensor(self.example) if point is None else point
        largest = float(at.abs().max())  # NaN where the point is
        if not largest <= LARGEST_INPUT:
            return InvalidArgument(
                f"images: with the method's noise and baseline, example {self.index} reaches {largest:g}, where the "
                "model's output or gradient is not finite"
            )
        return Internal(f'model "{self._model.name}": output or gradient is not finite for example {self.index}')

    def close(self) -> None:
        """End the run and free its memory on the device."""
        self._sweep = None
        self._steps.close()

    def _advance(self) -> None:
        """Resume the method until it yields a sweep or ends."""
        self._sweep = next(self._steps, None)
        self._n_taken = self._n_folded = 0

    def _explain(self) -> Generator[Sweep, None, None]:
        """Run the example itself first, then the method for each class that is explained."""
        method, top_k = self._request.method, self._prepared.top_k
        first = yield from evaluate(None, gradient=method.begins_with_gradient and not top_k)
        _check_target(self._request.target, self.resolved, top_k, self._model)
        if first.maps:  # the whole chunk was reduced at once, and nothing is left to do
            self.result = Result(
                (None,), first.maps, (self._target(first),), first.predicted, first.probability, first.probabilities
            )
            return
        if top_k or not method.is_one_row:
            first = first.copy()
        finished: list[Outcome] = []
        targets: list[ExplainedTarget] = []
        for resolved in self._resolve_targets(first, top_k):
            self.resolved = resolved
            if top_k:
                self._n_gradients = self._n_dead = 0
            start = (yield from evaluate(first.input, gradient=method.begins_with_gradient)) if top_k else first
            step = self._model.kernels.of(method.name).eps
            steps = method.run(Example(first.input, self.index, self._model.black, start, self._is_watched, step))
            outcome = self._finish((yield from self._watch(steps, first)))
            targets.append(self._target(start))
            # Copied, because a map may be a view that keeps its whole chunk alive.
            finished.append(replace(outcome, attribution=outcome.attribution.clone()) if top_k else outcome)
        self.result = self._result_of(first, tuple(targets), finished)

    def _resolve_targets(self, first: RowOutput, top_k: int) -> list[ResolvedTarget]:
        classes = first.probabilities.topk(top_k).indices.tolist() if top_k else [first.explained]
        return [replace(self.resolved, positive=each) for each in classes]

    def _watch(
        self, steps: Generator[Sweep | Improved, None, Outcome], first: RowOutput
    ) -> Generator[Sweep, None, Outcome]:
        """Yield a method's sweeps; store each improved outcome as a partial result."""
        try:
            while True:
                step = next(steps)
                if isinstance(step, Improved):
                    so_far = self._result_of(first, (self._target(first),), [self._finish(step.outcome)])
                    self.result = replace(so_far, is_final=False)
                else:
                    yield step
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome

    def _finish(self, outcome: Outcome) -> Outcome:
        """Return an outcome with its attribution finished into a map."""
        method, channels = self._request.method, self._request.channels
        return replace(outcome, attribution=method.finish(outcome.attribution, channels, self._prepared.shape))

    def _result_of(self, first: RowOutput, targets: tuple[ExplainedTarget, ...], finished: list[Outcome]) -> Result:
        return Result(
            tuple(each.is_negligible for each in finished),
            tuple(each.attribution for each in finished),
            targets,
            first.predicted,
            first.probability,
            first.probabilities,
            convergence=None if self._request.method.is_one_row else self._convergence(finished),
            is_exact=self._request.exact and all(each.attribution.dtype == torch.float64 for each in finished),
        )

    def _target(self, output: RowOutput) -> ExplainedTarget:
        # Saturated only if every gradient was: a single live one, as anywhere on a path, makes up the map.
        is_saturated = 0 < self._n_gradients == self._n_dead
        return ExplainedTarget(output.explained, output.score, is_saturated, self.resolved.negative)

    def _convergence(self, outcomes: list[Outcome]) -> Convergence:
        """Return the convergence of the worst of the maps."""
        met = [outcome.is_met for outcome in outcomes if outcome.is_met is not None]
        return Convergence(
            self._n_rows,
            _largest(outcome.error for outcome in outcomes),
            _largest(outcome.completeness_error for outcome in outcomes),
            _largest(outcome.relative_completeness_error for outcome in outcomes),
            tolerance=self._request.method.tolerance,
            is_met=all(met) if met else None,
        )


def _check_target(target: Target, resolved: ResolvedTarget, top_k: int, model: Model) -> None:
    """Check the target against the first output, for models whose output shape was not known before."""
    if isinstance(target, Dense) and target.needs_pixels and len(model.output_shape) == 1:
        raise not_dense(model)
    for index in (resolved.positive, resolved.negative):
        if index is not None and index >= model.class_count:
            raise InvalidArgument(f'target: class index {index}, model "{model.name}" has 0 to {model.class_count - 1}')
    if top_k > model.class_count:
        raise InvalidArgument(f'target.top_k.k: got {top_k}, model "{model.name}" has {model.class_count} classes')


def _largest(values: "Generator[float | None, None, None]") -> float | None:
    return max((value for value in values if value is not None), default=None)
