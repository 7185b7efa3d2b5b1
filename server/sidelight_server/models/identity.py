"""The identity of a model: the digest of its weights, and the canary, which differs if the computation does."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict

from torch import Tensor

from ..compute.kernel import Kernel
from ..compute.outputs.head import Head
from ..compute.passes.adapter import Adapter
from ..compute.weights import Changes, Identity, digest_of
from ..config.spec import ModelSpec
from ..inputs.preprocessing import Preprocessing
from ..telemetry.logs import Event

log = logging.getLogger("sidelight")


def facts_of(spec: ModelSpec, preprocessing: Preprocessing | None, head: Head | None, adapter: Adapter) -> str:
    """Return as JSON everything besides the weights that a map depends on.

    Without a trial run `head` is None, and the values of the spec count: the digest must not change after detection.
    """
    facts = {
        "preprocessing": preprocessing and asdict(preprocessing),
        "adapter": asdict(adapter),
        "outputs": head.outputs if head else spec.output_kind,
        "activation": head.activation if head else spec.activation,
        "labels": spec.class_names or (),
    }
    return json.dumps(facts | ({"layer_layout": dict(spec.layer_layout)} if spec.layer_layout else {}), sort_keys=True)


class ModelIdentity:
    """The identity of what computes a model's chunks. `trial` returns a fixed random input; None: no known size."""

    def __init__(self, name: str, kernel: Kernel, *, facts: str, trial: Callable[[], Tensor] | None) -> None:
        self._name = name
        self._kernel = kernel
        self._trial = trial
        self._facts = facts
        self._digest = ""
        self._digested: Changes | None = None  # state of the weights at the last `digest`
        self._seen: Changes | None = None  # and at the last `identify`
        self._identity = Identity()

    @property
    def digest(self) -> str:
        """The SHA-256 of the current weights and facts, in hexadecimal, computed again after a change."""
        detector = self._kernel.detector
        if (seen := detector.check()) != self._digested:
            self._digest, self._digested = digest_of(detector.module, facts=self._facts), seen
        return self._digest

    @property
    def canary(self) -> str:
        """The canary of the last `identify`; empty before the first chunk."""
        return self._identity.canary

    @property
    def is_current(self) -> bool:
        """Whether torch's version counters show no write to the weights since `identify`."""
        return self._seen is None or self._kernel.detector.check() == self._seen

    def identify(self) -> Identity:
        """Return the identity for the next chunk. On the device's thread.

        If the weights were written to, the replica, the digest and the canary are computed again. The canary is
        "C×H×W:digest", with the SHA-256 of the outputs and gradient at the trial input. It is empty if two runs differ
        or fail, or without a trial input.
        """
        seen = self._kernel.detector.check(at_values=True)
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
        except Exception as error:  # the next chunk will fail with the same error
            log.warning(Event("canary_failed", model=self._name, message=f"{type(error).__name__}: {error}"))
            return ""
        return f"{'×'.join(map(str, inputs.shape[1:]))}:{first}" if first == second else ""
