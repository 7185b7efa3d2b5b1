"""Backends of `BasicGradientSaliencyMaps`: a server, or an engine in this process."""

import threading
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from .._clients.client import Client
from .._inputs.targets import Dense
from ..exceptions import from_code

Classes = int | list[int] | None  # one class for all examples, one per example, or the predicted classes


class Remote:
    """A backend that calls a server."""

    def __init__(self, client: Client, model: str | None, *, owned: bool, timeout_s: float) -> None:
        self._client = client
        self._model = model
        self._owned = owned
        self._timeout_s = timeout_s

    def explain(self, images: NDArray[Any], classes: Classes) -> tuple[NDArray[Any], list[int]]:
        """Return maps, [N, H, W], and the predicted classes of images, [N, C, H, W]."""
        target = Dense() if classes is None else classes
        answer = self._client.attribute(
            images, model=self._model, target=target, timeout=self._timeout_s, on_error="return"
        )
        _raise_first(answer.failures)
        return answer.maps, [each.index for each in answer.predictions if each]

    def close(self) -> None:
        if self._owned:
            self._client.close()


class Local:
    """An engine for a module in this process. The first call creates it, with the shape of its images."""

    def __init__(self, server: Any, in_process: Any, module: Any, image_key: str, label_key: str) -> None:
        # sidelight_server and its in_process module are passed in, because the client must not import the server.
        self._server, self._in_process = server, in_process
        self._module = module
        self._keys = {"image_key": image_key, "label_key": label_key}
        self._lock = threading.Lock()
        self._engine: Any = None
        self._storage: tuple[object, ...] = ()
        self._closed = False

    def explain(self, images: NDArray[Any], classes: Classes) -> tuple[NDArray[Any], list[int]]:
        server = self._server
        target = server.Dense() if classes is None else classes
        target = server.PerExample(tuple(target)) if isinstance(target, list) else target
        request = server.Request(images, target=target, exact=True, plain_head=True)
        try:
            with self._lock:
                answer = self._ready(images.shape[1:]).attribute(request)
        except server.ConfigurationError as error:
            raise ValueError(str(error)) from error
        except server.SidelightError as error:
            raise from_code(error.code, error.message) from error
        _raise_first(answer.failures)
        return answer.maps, [each.predicted for each in answer.explanations if each]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._end()

    def _ready(self, shape: Any) -> Any:
        """Return the engine. If the module's weights moved to other memory, it is a new one."""
        if self._closed:
            raise RuntimeError("the saliency maps are closed")
        storage = self._in_process.storage(self._module)
        if self._engine is None or self._storage != storage:
            self._end()
            specs = self._in_process.specs_of(self._module, trial_size=shape, **self._keys)
            self._engine, self._storage = self._in_process.InProcess(specs), storage
        return self._engine

    def _end(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _raise_first(failures: Sequence[Any]) -> None:
    if failures:
        first = failures[0]
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise from_code(first.code, f"example {first.example}: {first.message}{more}")
