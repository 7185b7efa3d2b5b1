"""A proxy between client and server that stalls, delays and cuts connections."""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Iterator


class Proxy:
    """Bytes from one UNIX socket to another. All methods may be called from any thread."""

    def __init__(self, upstream: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.address = f"unix:{self._folder.name}/proxy"
        self.n_connections = 0
        self.n_bytes = 0
        self.delay_s = 0.0
        self._upstream = upstream.removeprefix("unix:")
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def start(self) -> None:
        self._thread.start()
        listening = asyncio.start_unix_server(self._serve, self.address.removeprefix("unix:"))
        self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result(10)

    def stop(self) -> None:
        self.cut()
        self._call(self._server.close)
        asyncio.run_coroutine_threadsafe(self._ended(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._folder.cleanup()

    def cut(self) -> None:
        """End every connection; new ones are accepted."""

        def cut() -> None:
            for writer in self._open:
                writer.transport.abort()

        self._call(cut)

    def stall(self) -> None:
        """Let nothing through, in either direction."""
        self._call(self._flowing.clear)

    def flow(self) -> None:
        """Let everything through again."""
        self._call(self._flowing.set)

    def _call(self, act: object) -> None:
        async def run() -> None:
            act()  # type: ignore[operator]

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def _ended(self) -> None:
        mine = asyncio.current_task()
        tasks = [each for each in asyncio.all_tasks() if each is not mine]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        with contextlib.suppress(OSError, asyncio.CancelledError):  # cancelled once the proxy stops
            there, back = await asyncio.open_unix_connection(self._upstream)
            self._open |= {writer, back}
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, back))
                    group.create_task(self._pump(there, writer))
            finally:
                self._open -= {writer, back}
                back.transport.abort()
        writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._flowing.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                self.n_bytes += len(data)
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@contextlib.contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    """Run a proxy in front of a server's UNIX socket."""
    running = Proxy(upstream)
    running.start()
    try:
        yield running
    finally:
        running.stop()
