"""The same exchange through the Python clients: images in, maps out."""

import itertools

import numpy as np
import sidelight
import sidelight.aio

from .messages import Case


def exchange_by_client(address: str, case: Case) -> None:
    """Stream a round of messages with `sidelight.connect`, with as many batches in flight as with raw stubs."""
    with sidelight.connect(address) as client:
        answers = client.stream(_batches(case), channels="none", window=case.window * case.shape[0])
        _check(case, sum(answer.maps.shape == case.shape for answer in answers))


async def exchange_by_async_client(address: str, case: Case) -> None:
    """Do the same with `sidelight.aio.connect`."""
    async with sidelight.aio.connect(address) as client:
        answers = client.stream(_batches(case), channels="none", window=case.window * case.shape[0])
        _check(case, sum([answer.maps.shape == case.shape async for answer in answers]))


def _batches(case: Case) -> "itertools.repeat[np.ndarray]":
    return itertools.repeat(np.random.default_rng(0).standard_normal(case.shape).astype(np.float32), case.n)


def _check(case: Case, n_answered: int) -> None:
    assert n_answered == case.n
