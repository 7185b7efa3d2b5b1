"""Engines for the tests of methods: requests and answers without a network, on the CPU.

A module in float64 is served in float64. Its maps come back as float32, half a unit in the last place of which is 6e-8
of a value: that is the tolerance of a law, and `atol` a share of the largest value where values cancel.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import numpy as np
from sidelight_server import Answer, Channels, Engine, ModelSpec, Request, Score, Settings
from torch import Tensor, nn

from support.tolerances import FLOAT32

Explain = Callable[..., Answer]


def ask(engine: Engine, images: Tensor | np.ndarray, **question: object) -> Answer:
    """Explain one batch: by default the logit, with its sign and all its channels."""
    plain = {"score": Score.LOGIT, "channels": Channels.NONE} | question
    array = images.detach().numpy() if isinstance(images, Tensor) else images
    return asyncio.run(engine.attribute(Request(array, **plain)))


def tried(engine: Engine, like: Tensor) -> Engine:
    """Run the introspection of the models of an engine that has not started, which takes rows of its own."""
    for model in engine.models.values():
        model.introspect(like[:1].to(model.kernel.device, model.kernel.dtype))
    return engine


@contextlib.contextmanager
def explaining(module: nn.Module, *, settings: Settings | None = None, **spec: object) -> Iterator[Explain]:
    """Run an engine on a module, and give a function that explains a batch by a method, every example of it."""
    with Engine([ModelSpec(module, **spec)], settings or Settings(device="cpu", threads=1)) as engine:

        def explain(images: Tensor | np.ndarray, method: object, **question: object) -> Answer:
            answer = ask(engine, images, method=method, **question)
            assert not answer.failures
            return answer

        yield explain


def assert_close(maps: np.ndarray, expected: Tensor | np.ndarray, *, share: float = FLOAT32) -> None:
    """Check maps of the same shape, to a share of the largest value of them all."""
    expected = expected.detach().numpy() if isinstance(expected, Tensor) else expected
    assert maps.dtype == np.float32
    assert maps.shape == expected.shape
    np.testing.assert_allclose(maps, expected, rtol=0, atol=share * np.abs(expected).max())
