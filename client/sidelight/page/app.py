"""The page's routes, as a Starlette application."""

import asyncio
import base64
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from .. import __version__
from ..aio import AsyncClient
from ..exceptions import InvalidArgument, MessageTooLarge, NotFound, SidelightError
from ..results.storage import plain
from ..visualization.colormaps import NAMES, find_colormap
from . import controls
from .explanations import Event, Explainer, error_event
from .guard import Guard
from .pictures import MAX_FILE_BYTES, PictureStore, rendition, shown_window, thumbnail

STATIC = Path(__file__).parent / "static"
MAX_JSON_BYTES = 1024 * 1024
N_DECODERS = 2  # pictures decoded at once: each may take a few hundred megabytes

_STATUSES: dict[type[SidelightError], int] = {NotFound: 404, MessageTooLarge: 413}
_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Page:
    """The page's state and handlers. `probe` is a client with a short timeout, for the status of the server."""

    def __init__(self, client: AsyncClient, probe: AsyncClient, pictures: PictureStore) -> None:
        self._client, self._probe = client, probe
        self._pictures = pictures
        self._explainer = Explainer(client)
        self._decoders = asyncio.Semaphore(N_DECODERS)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Close the clients and delete the uploads at the end."""
        try:
            yield
        finally:
            await self._client.close()
            await self._probe.close()
            self._pictures.close()

    def routes(self) -> list[Route | Mount]:
        return [
            Route("/", _index),
            Route("/setup", _with_json_errors(self._setup)),
            Route("/server", _with_json_errors(self._server)),
            Route("/model", _with_json_errors(self._model)),
            Route("/pictures", _with_json_errors(self._upload), methods=["POST"]),
            Route("/pictures/{id}/{kind}", _with_json_errors(self._picture)),
            Route("/classify", _with_json_errors(self._classify), methods=["POST"]),
            Route("/explain", _with_json_errors(self._explain), methods=["POST"]),
            Route("/answers/{id}/{file}", _with_json_errors(self._file)),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]

    async def _setup(self, request: Request) -> Response:
        return JSONResponse(
            controls.describe()
            | {
                "version": __version__,
                "address": self._client.address,
                "colormaps": {name: _tables(name) for name in NAMES},
                "pictures": [each.to_dict() for each in self._pictures.all()],
                "max_file_bytes": MAX_FILE_BYTES,
            }
        )

    async def _server(self, request: Request) -> Response:
        began = time.perf_counter()
        try:
            info = await self._probe.info()
        except SidelightError as error:
            return JSONResponse({"reachable": False} | error_event(error))
        round_trip_s = time.perf_counter() - began
        return JSONResponse({"reachable": True, "round_trip_s": round_trip_s} | plain(dataclasses.asdict(info)))

    async def _model(self, request: Request) -> Response:
        return JSONResponse(await self._explainer.model(request.query_params.get("name")))

    async def _upload(self, request: Request) -> Response:
        name = request.query_params.get("name", "picture")
        picture = await self._pictures.add(name, request.stream())
        return JSONResponse(picture.to_dict())

    async def _picture(self, request: Request) -> Response:
        picture = self._pictures.find(request.path_params["id"])
        window = shown_window([request.query_params.get(each) for each in ("low", "high")])
        async with self._decoders:
            content = await asyncio.to_thread(picture.read)
            if request.path_params["kind"] == "thumbnail":
                drawn, media_type = await asyncio.to_thread(thumbnail, content)
            else:
                drawn, media_type = await asyncio.to_thread(rendition, content, window)
        return Response(drawn, media_type=media_type)

    async def _classify(self, request: Request) -> Response:
        options = await _json(request)
        ids = options.get("pictures")
        if not isinstance(ids, list):
            raise InvalidArgument("pictures: expected a list of ids")
        pictures, model = [self._pictures.find(each) for each in ids], options.get("model")
        return _events(self._explainer.classify(pictures, model if isinstance(model, str) else None))

    async def _explain(self, request: Request) -> Response:
        options = await _json(request)
        return _events(self._explainer.explain(self._pictures.find(options.get("picture")), options))

    async def _file(self, request: Request) -> Response:
        content = await self._explainer.file(request.path_params["id"], request.path_params["file"])
        return Response(content, media_type="application/octet-stream")


def make_app(client: AsyncClient, probe: AsyncClient, paths: Sequence[Path], *, hosts: Collection[str]) -> Starlette:
    """Return the application. It shows the pictures of `paths`, may be opened as `hosts`, and closes the clients."""
    page = Page(client, probe, PictureStore(paths))
    return Starlette(routes=page.routes(), lifespan=page.lifespan, middleware=[Middleware(Guard, hosts=hosts)])


async def _index(request: Request) -> Response:
    return FileResponse(STATIC / "index.html")


def _with_json_errors(handler: _Handler) -> _Handler:
    """Return an error as JSON, with the same fields as an event of a stream."""

    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except SidelightError as error:
            return JSONResponse(error_event(error), _STATUSES.get(type(error), 400))

    return answered


def _events(events: AsyncGenerator[Event]) -> Response:
    """Stream events as lines of JSON. If the browser disconnects, the generator is closed, which cancels the call."""

    async def lines() -> AsyncGenerator[str]:
        async with contextlib.aclosing(events):
            async for event in events:
                yield json.dumps(event) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


async def _json(request: Request) -> dict[str, object]:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_JSON_BYTES:
            raise MessageTooLarge(f"request: larger than {MAX_JSON_BYTES} bytes")
    try:
        options = json.loads(content)
    except (ValueError, RecursionError):
        raise InvalidArgument("request: expected JSON") from None
    if not isinstance(options, dict):
        raise InvalidArgument(f"request: got {type(options).__name__}, expected an object")
    return options


def _tables(name: str) -> dict[str, object]:
    """Return a color map as base64 of [256, 3] bytes for values above zero and below it."""
    colormap = find_colormap(name, signed=False)
    above, below = (base64.b64encode(each.tobytes()).decode() for each in (colormap.above, colormap.below))
    return {"above": above, "below": below, "diverging": colormap.is_diverging}
