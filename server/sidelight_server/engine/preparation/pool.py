"""The preparation pool: the threads and processes that decode, resize and check requests, and draw their maps."""

import asyncio
import functools
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from ...compute.host_memory import limit_bytes
from ...domain import MANY_EXAMPLES, Array, Files, Request
from ...errors import SidelightError
from ...inputs.decode_worker import PictureOrder
from ...models.model import Model
from .decoder_pool import DecoderPool
from .decoder_process import Fitted
from .examples import Prepared, check, needs_resizing, order, prepare
from .fair_thread_pool import FairThreadPool

_Value = TypeVar("_Value")


class PreparationPool:
    """Prepares the requests whose preparation takes longer than waking a thread, and draws pictures."""

    def __init__(self, n_threads: int) -> None:
        # One pool per kind of work, so that short work does not wait behind another caller's long work.
        self._checking = FairThreadPool(1, name="sidelight-prepare")
        self._resizing = FairThreadPool(n_threads, name="sidelight-resize")
        self._drawing = FairThreadPool(n_threads, name="sidelight-draw")
        self._decoders = DecoderPool(n_threads, memory_bytes=limit_bytes())
        self._closed = threading.Event()

    def is_gone(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    def start_decoders(self) -> None:
        """Start the decoder processes now; otherwise they start with the first file."""
        self._decoders.start()

    def close(self, *, wait: bool = False) -> None:
        """End the processes and, after their current work, the threads; with `wait`, wait for the threads."""
        self._closed.set()
        self._decoders.close()
        for pool in (self._checking, self._resizing, self._drawing):
            pool.close(wait=wait)

    async def prepare(self, model: Model, request: Request, caller: str) -> Prepared:
        """Decode, resize and check a request's examples. Raises `SidelightError` if the whole request is invalid."""
        decoded: Sequence[Fitted] = ()
        if isinstance(request.images, Files):
            await to_thread_if_many(request.n_examples, check, model, request)  # before any file is decoded
            decoded = await self._decoders.fit(request.images.files, order(model), caller)
            if request.method.given_baselines is None:
                is_gone = self.is_gone
                return await to_thread_if_many(
                    request.n_examples, prepare, model, request, is_gone=is_gone, decoded=decoded
                )
        left = threading.Event()
        preparing = functools.partial(
            prepare, model, request, is_gone=lambda: left.is_set() or self._closed.is_set(), decoded=decoded
        )
        pool = self._resizing if needs_resizing(request.images) else self._checking
        try:
            return await asyncio.wrap_future(pool.submit(caller, preparing))
        finally:
            left.set()

    async def picture(self, file: bytes, order: PictureOrder, caller: str) -> Array:
        """Return a file as an RGB picture, uint8 [H, W, 3]. Raises `SidelightError`."""
        decoded = await self._decoders.fit_one(file, order, caller)
        if isinstance(decoded, SidelightError):
            raise decoded
        return decoded[0]

    async def draw(self, drawing: Callable[[], _Value], caller: str) -> _Value:
        """Call a function that draws a picture, in a drawing thread. Raises `Unavailable` once closed."""
        return await asyncio.wrap_future(self._drawing.submit(caller, drawing))


async def to_thread_if_many(
    n_examples: int, function: Callable[..., _Value], *arguments: object, **named: object
) -> _Value:
    """Call a function whose time grows with the examples: in a worker thread if there are many, else directly."""
    if n_examples <= MANY_EXAMPLES:
        return function(*arguments, **named)
    return await asyncio.to_thread(function, *arguments, **named)
