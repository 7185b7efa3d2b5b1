"""A running rival: its processes, and the commands to its driver."""

import contextlib
import json
import os
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from .record import Round, percentile
from .rival import Flags, NotRun, Rival, free_port

ROOT = Path(__file__).parent.parent.parent
READY_S, ORDER_S, STOP_S = 150.0, 120.0, 10.0


class Running:
    """A rival's processes with one set of flags: a server, and the driver that calls it. Use `with`."""

    def __init__(self, rival: Rival, flags: Flags, folder: Path) -> None:
        self.rival = rival
        self.flags = flags
        self._folder = folder
        self._server: subprocess.Popen[bytes] | None = None
        self._driver: subprocess.Popen[str] | None = None
        self._log = folder / f"{rival.module}-{'-'.join(flags).replace('--', '')}.log"

    def __enter__(self) -> Self:
        if not self.rival.python.exists():
            raise NotRun(f"{self.rival.python.parent.parent.name} is absent: make peers")
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def measure(self, at_once: int, n_images: int, *, answers: Path | None = None) -> Round:
        """Have the driver send `n_images` images."""
        order = {"at_once": at_once, "n_images": n_images, "answers": answers and str(answers)}
        driver = self._driver
        assert driver is not None
        assert driver.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # if it has ended, reading its reply fails
            driver.stdin.write(json.dumps(order) + "\n")
            driver.stdin.flush()
        said = self._listen(ORDER_S)
        return Round(n_images / said["wall_s"], percentile(said["latencies_s"], 0.99))

    def pause(self) -> None:
        """Pause its server: even an idle one wakes up now and then."""
        for process in self._servers():
            process.suspend()

    def resume(self) -> None:
        """Resume its server."""
        for process in self._servers():
            process.resume()

    def stop(self) -> None:
        """End its processes."""
        if self._driver is not None:
            self._driver.kill()
            self._driver.wait()
            for pipe in (self._driver.stdin, self._driver.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        family = self._servers()
        for process in family:  # all of them: some servers do not end their workers
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
                process.terminate()
        _, alive = psutil.wait_procs(family, STOP_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._server is not None:
            self._server.wait()

    def _start(self) -> None:
        port, place = free_port(), [str(self._folder)]
        command = [str(self.rival.python), "-m", f"benchmarks.peers.{self.rival.module}"]
        options: dict[str, Any] = {"cwd": self._folder, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
        with self._log.open("ab") as log:
            if self.rival.serves:
                serve = [*command, "serve", *place, "--port", str(port), *self.flags]
                self._server = subprocess.Popen(serve, stdout=log, stderr=log, stdin=subprocess.DEVNULL, **options)
            drive = [*command, "drive", *place, "--port", str(port), *self.flags]
            self._driver = subprocess.Popen(
                drive, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, **options
            )
        watch = threading.Thread(target=self._give_up_with_server, daemon=True)
        watch.start()
        self._listen(READY_S)

    def _give_up_with_server(self) -> None:
        """End the driver once its server is gone: it would wait for it forever."""
        if self._server is not None:
            self._server.wait()
            assert self._driver is not None
            self._driver.kill()

    def _listen(self, limit_s: float) -> dict[str, Any]:
        driver = self._driver
        assert driver is not None
        assert driver.stdout is not None
        timer = threading.Timer(limit_s, driver.kill)
        timer.start()
        line = driver.stdout.readline()
        timer.cancel()
        if not line:
            raise NotRun(self._last_words() or f"no answer within {limit_s:.0f} s")
        words: dict[str, Any] = json.loads(line)
        return words

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines()]
        telling = [line for line in lines if "Error" in line or "error" in line] or [line for line in lines if line]
        return telling[-1][:200] if telling else ""

    def _servers(self) -> list[psutil.Process]:
        """Return the server's process and its descendants, oldest first."""
        if self._server is None:
            return []
        try:
            server = psutil.Process(self._server.pid)
            return [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
