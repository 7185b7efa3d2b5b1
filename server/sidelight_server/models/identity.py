"""The identity of a model: the digest of its weights, and the canary, which tells networks with equal weights apart."""

import logging
from collections.abc import Callable

from torch import Tensor

from ..compute.kernel import Kernel
from ..compute.weights import Identity, Seen, Weights
from ..telemetry.logs import Event

log = logging.getLogger("sidelight")


class ModelIdentity:
    """What a model's chunks are computed by. `trial` gives one fixed random input; None: the model has no such size."""

    def __init__(self, name: str, kernel: Kernel, *, facts: str, trial: Callable[[], Tensor] | None) -> None:
        self._name = name
        self._kernel = kernel
        self._trial = trial
        self._weights = Weights(kernel.watch, facts=facts)
        self._seen: Seen | None = None  # of the state that the identity is of
        self._identity = Identity()

    @property
    def digest(self) -> str:
        """The SHA-256 of weights and facts, in hexadecimal, as they are now."""
        return self._weights.digest

    @property
    def canary(self) -> str:
        """That of `identify`; empty before the first chunk."""
        return self._identity.canary

    @property
    def is_current(self) -> bool:
        """Whether the weights have not been written to since `identify`, as far as torch counts."""
        return self._seen is None or self._kernel.watch.look() == self._seen

    def identify(self) -> Identity:
        """Return what the next chunk is computed by. On the thread that owns the device.

        Weights that others have written to are noticed, and the replica, the digest and the canary are made anew. The
        canary is the SHA-256 of what the replica makes of the trial, as "C×H×W:digest". It is empty where two runs
        differ, or fail, or there is no trial.
        """
        seen = self._kernel.watch.look(at_values=True)
        if seen != self._seen:
            self._identity = Identity(self.digest, self._canary())
            self._seen = seen
        return self._identity

    def _canary(self) -> str:
        if self._trial is None:
            return ""
        inputs = self._trial()
        try:
            first, second = (self._kernel.fingerprint(inputs) for _ in range(2))
        except Exception as error:  # the chunk that follows says what is wrong, to who asks
            log.warning(Event("canary_failed", model=self._name, message=f"{type(error).__name__}: {error}"))
            return ""
        return f"{'×'.join(map(str, inputs.shape[1:]))}:{first}" if first == second else ""
