"""Servers of one or several small models, and their maps."""

import contextlib
from collections.abc import Iterator

import numpy as np
import sidelight
import sidelight_server
import torch
from sidelight_server import ModelSpec

from support.models import small_cnn
from support.models.reloadable import SIZE
from support.tolerances import NEIGHBORS

FLOATS = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(5)).numpy()


@contextlib.contextmanager
def serving(**settings: object) -> Iterator[sidelight.Client]:
    with (
        sidelight_server.serve(device="cpu", threads=1, **settings) as address,
        sidelight.connect(address, connect_timeout=20) as client,
    ):
        yield client


def maps_of(seed: int) -> np.ndarray:
    with serving_module(seed) as client:
        return client.attribute(FLOATS).maps


@contextlib.contextmanager
def serving_module(seed: int) -> Iterator[sidelight.Client]:
    spec = ModelSpec(small_cnn(seed=seed), input_size=SIZE)
    with sidelight_server.serve(spec, device="cpu", threads=1) as address, sidelight.connect(address) as client:
        yield client


def assert_close(maps: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(maps, expected, rtol=0, atol=NEIGHBORS * np.abs(expected).max())
