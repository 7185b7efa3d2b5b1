"""The kernel: computes outputs and gradients of a chunk on a replica of the model.

Everything here runs on the thread that owns the device. `torch.autograd.grad` computes the gradient at the probe only,
so no parameter gets a gradient and the caller's module is never written to. (`zero_grad()` and `.backward()` on a
shared module crash the process if two threads call them.)
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..config.options import KernelOptions
from ..domain import ResolvedTarget, Score
from ..errors import FailedPrecondition
from ..methods.method import Layer, Probe, Rectifiers
from .outputs.head import Head
from .outputs.interpretation import KernelOutput, at_least_float32, interpret_outputs
from .passes.adapter import PLAIN, Adapter
from .passes.cuda_graphs import Recordings, recorder
from .passes.forward import Forward
from .passes.layer_hooks import NOTHING_TO_GUIDE, Guided, capture
from .passes.layers import Layers
from .replica.replica import SHARED, Isolation, Replica, replicate, weights_dtype
from .saved_memory import SavedMemory
from .weights import ChangeDetector

# Evaluates outputs: returns the kernel's output, and the gradients of the scores at the outputs.
_Interpret = Callable[[Tensor], "tuple[KernelOutput, Tensor | None]"]

LEAST_EXPONENT = -125  # exponent of the smallest power of two whose inverse is a float32


class Kernel:
    """Runs one model on one device, on a replica.

    `dtype` is the type of points and gradients. If the operator sets a precision, the module computes in that and
    everything around it in float32. BatchNorm fusion, compilation and CUDA graphs need a `trial` input, [n, C, H, W].

    The constructor raises `ConfigurationError` for an option that the module does not support. `run` raises whatever
    the module raises, and `OutputsError` if it returns something unexpected.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        device: torch.device,
        adapter: Adapter = PLAIN,
        head: Head | None = None,
        layers: Layers | None = None,
        options: KernelOptions | None = None,
        trial: Tensor | None = None,
        isolation: Isolation = SHARED,
        is_shared: bool = False,
    ) -> None:
        self.options = options or KernelOptions()
        self.dtype = torch.float32 if self.options.precision else weights_dtype(module)
        self.device = device
        self.head = head or Head()
        self._layers = layers or Layers()
        self.detector = ChangeDetector(module, is_shared=is_shared)
        self._replica = Replica(
            self.detector, device=device, options=self.options, adapter=adapter, trial=trial, isolation=isolation
        )
        self._forward = Forward(adapter, self.options, dtype=self.dtype, compute_dtype=self._replica.dtype)
        if self.options.fold and not self.n_folded:  # provenance must not list an option that had no effect
            self.options = self.options.model_copy(update={"fold": False})
        self._hooked_replica: nn.Module | None = None
        self._recordings: Recordings | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._replica.dtype

    @property
    def eps(self) -> float:
        """The rounding step of gradients, relative to their size."""
        return torch.finfo(torch.bfloat16 if self._forward.backward else self.compute_dtype).eps

    @property
    def has_mixed(self) -> bool:
        """Whether any product of a backward pass was computed in bfloat16 while the rest is float32."""
        return self._forward.backward is not None and self._forward.backward.n_products > 0

    @property
    def n_folded(self) -> int:
        """Number of BatchNorms that were fused into the layer before them."""
        return self._replica.n_folded

    @property
    def summary(self) -> str:
        """The precision and options, such as "float32" or "bfloat16+fold"."""
        return self.options.summary(self.precision)

    @property
    def precision(self) -> str:
        """The type that the module computes in, or "mixed"."""
        return "mixed" if self._forward.backward else str(self.compute_dtype).removeprefix("torch.")

    @property
    def _hooked(self) -> nn.Module:
        """A second replica, for passes with hooks. It shares the weights."""
        if self._hooked_replica is None:
            self._hooked_replica = replicate(self._replica.plain)
        return self._hooked_replica

    @property
    def _recorded(self) -> Recordings:
        if self._recordings is None:
            self._recordings = Recordings(self.outputs_of, functools.partial(recorder, self.device))
        return self._recordings

    def run(
        self,
        inputs: Tensor,
        resolved_targets: Sequence[ResolvedTarget],
        wanted: Sequence[Score],
        *,
        probe: Probe = None,
        gradient: bool = True,
        plain_head: bool = False,
    ) -> KernelOutput:
        """Run inputs, [n, C, H, W]; return each row's score of its own target, and the gradient if requested.

        A class index of K or more is clamped: the caller finds K in the output and fails that row. With `plain_head`
        every score is computed in the type of the outputs, as plain `torch.autograd` does; see `Head.score`.
        """
        self._refresh()
        inputs = inputs.detach()

        def interpret(outputs: Tensor) -> tuple[KernelOutput, Tensor | None]:
            return interpret_outputs(
                outputs,
                self.head,
                resolved_targets,
                wanted,
                gradient=gradient,
                plain_head=plain_head,
                step=torch.finfo(self.compute_dtype).eps,
            )

        if not gradient:
            with torch.no_grad():
                recording = self._recorded.of(inputs) if self.options.cuda_graphs else None
                outputs = recording.outputs(inputs) if recording else self.outputs_of(inputs)
                return interpret(outputs)[0]
        match probe:
            case Layer(name):
                return self._at_layer(inputs, interpret, name)
            case Rectifiers.GUIDED:
                with Guided() as guided:  # has no effect on a compiled module, so the original module runs
                    answer = self._at_input(inputs, interpret, module=self._uncompiled)
                if not guided.n_rectifiers:
                    raise FailedPrecondition(NOTHING_TO_GUIDE)
                return answer
            case None if self.options.cuda_graphs:
                return self._replay(inputs, interpret)
            case None:
                return self._at_input(inputs, interpret)

    def saved_memory(self, inputs: Tensor, *, limit: int) -> SavedMemory:
        """Run a forward pass and return the memory that autograd saved in it; stop the pass at `limit` bytes."""
        self._refresh()
        module, leaf = self._uncompiled, inputs.detach().clone().requires_grad_()
        with SavedMemory(limit=limit, weights=module) as kept, torch.enable_grad():
            try:
                self.outputs_of(leaf, module=module)
            except Exception:  # `SavedMemory` stops the pass with an error, which the module may replace
                if not kept.is_over:
                    raise
        return kept

    @property
    def _uncompiled(self) -> nn.Module:
        plain = self._replica.plain
        module: nn.Module = getattr(plain, "_orig_mod", plain)
        return module

    def _refresh(self) -> None:
        if self._replica.is_stale:
            self._replica.refresh()
            if self._forward.backward:
                self._forward.backward.forget()
            self._hooked_replica = self._recordings = None

    def fingerprint(self, inputs: Tensor) -> str:
        """Return the SHA-256 of the module's outputs at `inputs` and of the gradient of their weighted sum.

        In hexadecimal, over types, shapes and bytes; without a gradient, of the outputs only. The weights rise from 1
        to 2 over the outputs, because an unweighted sum of probabilities would be constant.
        """
        self._refresh()
        leaf = inputs.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self.outputs_of(leaf)
            weights = torch.linspace(1, 2, outputs[0].numel(), dtype=outputs.dtype, device=outputs.device)
            total = (outputs.flatten(1) * weights).sum()
            gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
        digest = hashlib.sha256()
        for each in (outputs.detach(), gradient):
            if each is not None:
                digest.update(f"{each.dtype} {list(each.shape)}\n".encode())
                digest.update(each.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def adopt(self, *, adapter: Adapter, head: Head, layers: Layers) -> None:
        """Replace adapter, head and layers with those that introspection found after the kernel was created."""
        self._forward.adapter, self.head, self._layers = adapter, head, layers

    def head_precision(self, score: Score, *, plain_head: bool) -> str:
        """Return the type that a score and its gradient at the outputs are computed in, for provenance."""
        outputs = self.dtype if plain_head else torch.promote_types(self.dtype, torch.float32)
        return self.head.precision(score, outputs=outputs, device=self.device, is_plain=plain_head)

    def outputs_of(self, inputs: Tensor, *, module: nn.Module | None = None) -> Tensor:
        """Return the module's outputs, [n, K] or [n, K, h, w]."""
        # Not `module or …`: bool() of a compiled module calls a `__len__` that it does not have.
        return self._forward(inputs, self._replica.module if module is None else module)

    def _at_input(self, inputs: Tensor, interpret: _Interpret, *, module: nn.Module | None = None) -> KernelOutput:
        inputs.requires_grad_()
        with torch.enable_grad():
            outputs = self.outputs_of(inputs, module=module)
        answer, grad_outputs = interpret(outputs)
        return replace(answer, gradients=self._gradients(grad_outputs, outputs, inputs))

    def _gradients(self, grad_outputs: Tensor | None, outputs: Tensor, leaf: Tensor) -> Tensor:
        """Backpropagate the gradients at the outputs, `grad_outputs`, to a leaf of the graph."""

        def back(each: Tensor) -> Tensor:
            given = (each.to(outputs.dtype),)
            has_graph = outputs.requires_grad
            (gradient,) = torch.autograd.grad(outputs, leaf, given, allow_unused=True) if has_graph else (None,)
            if gradient is None:
                raise FailedPrecondition("method: the model's outputs have no gradient; use occlusion or rise")
            return gradient

        return self._backpropagate(grad_outputs, back)

    def _replay(self, inputs: Tensor, interpret: _Interpret) -> KernelOutput:
        """As `_at_input`, with the forward and the backward pass replayed from CUDA graphs."""
        recording = self._recorded.of(inputs)
        answer, grad_outputs = interpret(recording.outputs(inputs))
        return replace(answer, gradients=self._backpropagate(grad_outputs, recording.gradients))

    def _backpropagate(self, grad_outputs: Tensor | None, back: Callable[[Tensor], Tensor]) -> Tensor:
        """Backpropagate `grad_outputs`, the gradients at the outputs, with `back`; return at least float32."""
        assert grad_outputs is not None  # noqa: S101
        if self.compute_dtype != torch.float16 or grad_outputs.dtype == torch.float16:
            return at_least_float32(back(grad_outputs))
        # The gradient of a probability near 1 underflows in float16. So each row is scaled by a power of two to about 1
        # before the backward pass, and scaled back after it, without another rounding.
        largest = grad_outputs.flatten(1).abs().amax(dim=1)  # [n]
        exponent = torch.frexp(largest).exponent.clamp(min=LEAST_EXPONENT)
        scale = torch.ldexp(torch.ones_like(largest), -exponent)
        return _row_by_row(at_least_float32(back(_row_by_row(grad_outputs, scale))), 1 / scale)

    def _at_layer(self, inputs: Tensor, interpret: _Interpret, name: str) -> KernelOutput:
        name = self._layers.choose(name, [])  # only known now if the model takes any input size
        # The graph begins at the layer; the layers before it run without one.
        with torch.enable_grad(), capture(self._hooked, name) as leaves:
            outputs = self._forward(inputs, self._hooked, copies=True)
        (leaf,) = leaves
        answer, grad_outputs = interpret(outputs)
        layout, size = self._layers.layouts[name], (inputs.shape[2], inputs.shape[3])
        gradients = layout.arrange(self._gradients(grad_outputs, outputs, leaf), size)
        return replace(answer, gradients=gradients, activations=layout.arrange(leaf.detach(), size).to(self.dtype))


def _row_by_row(rows: Tensor, factors: Tensor) -> Tensor:
    return rows * factors.view(-1, *[1] * (rows.ndim - 1)).to(rows.dtype)
