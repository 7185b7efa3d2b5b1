"""PyHealth's class compared with ours, the time for loading and preprocessing, and latencies during a reload."""

import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import sidelight
import torch
from sidelight.pyhealth import BasicGradientSaliencyMaps
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.compute.kernel import Kernel
from sidelight_server.compute.torch_device import cpu_quota
from sidelight_server.inputs.preprocessing import Preprocessing

from ..support.measure import Line, in_turns, ratio, server
from ..support.nets import SIZE, resnet18
from ..support.original import PyHealthModel, original_class
from .kernel import maps

SOURCE = "python:benchmarks.support.nets:resnet18"
LOADING_GOAL = 1.5
PREPROCESSING_GOAL = 0.1
RELOAD_GOAL = 2.0
N_PICTURES = 32
N_CALLERS = 4
N_RELOADS = 8
QUIET_S = 20.0


def run() -> list[Line]:
    """Measure everything on a ResNet-18."""
    torch.set_num_threads(cpu_quota())
    with tempfile.TemporaryDirectory(prefix="sidelight-") as folder:
        weights = Path(folder) / "resnet18.safetensors"
        safetensors.torch.save_file(resnet18().module.state_dict(), weights)
        return [_drop_in(), _loading(weights), _preprocessing(), *_reloads(weights)]


def _drop_in() -> Line:
    """Compare the original class and ours on a batch of 8, in this process."""
    model, images = PyHealthModel(resnet18().module).eval(), torch.rand(8, 3, SIZE, SIZE)
    with BasicGradientSaliencyMaps(model) as ours:
        theirs = original_class()(model)
        are_equal = torch.equal(ours.attribute(image=images)["image"], theirs.attribute(image=images)["image"])
        rivals = {"theirs": lambda: theirs.attribute(image=images), "ours": lambda: ours.attribute(image=images)}
        seconds = in_turns(rivals)
    times = ratio(seconds["theirs"], seconds["ours"])
    return Line(
        what="sidelight.pyhealth's class over PyHealth's own, in one process, ResNet-18, batch 8",
        figure=times,
        unit="×",
        goal="> 1, bit-equal",
        met=times > 1 and are_equal,
        detail="bit-equal" if are_equal else "not equal",
    )


def _loading(weights: Path) -> Line:
    """Compare loading an engine from a source with making the module, reading its weights and one forward pass."""
    settings = Settings(model=SOURCE, weights=weights, device="cpu", threads=cpu_quota())
    trial = torch.rand(2, 3, SIZE, SIZE)

    def read() -> torch.nn.Module:
        module = resnet18().module
        module.load_state_dict(safetensors.torch.load_file(weights))
        return module.eval()

    def tried() -> None:
        leaf = trial.clone().requires_grad_()
        torch.autograd.grad(read().requires_grad_(False)(leaf).sum(), leaf)

    def engine() -> None:
        Engine(list(settings.of_models().values()), settings)

    seconds = in_turns({"read": read, "tried": tried, "engine": engine})
    times = ratio(seconds["engine"], seconds["tried"])
    alone = ratio(seconds["engine"], seconds["read"])
    return Line(
        what="loading a ResNet-18, over torch's own loading and one try of two pictures",
        figure=times,
        unit="×",
        goal=f"≤ {LOADING_GOAL}",
        met=times <= LOADING_GOAL,
        detail=f"{statistics.median(seconds['engine']):.2f} s; {alone:.1f} × reading the weights without any try",
    )


def _preprocessing() -> Line:
    """Compare the time for preprocessing pictures in one thread with the kernel's time."""
    spec: ModelSpec = resnet18()
    preprocessing = Preprocessing(
        channels=3, height=SIZE, width=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3, resize=256, interpolation="bilinear"
    )
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (N_PICTURES, 480, 640, 3), np.uint8)
    kernel = Kernel(spec.module, device=torch.device("cpu"))
    floats = torch.rand(8, 3, SIZE, SIZE)

    def fitted() -> None:
        for each in pictures:
            preprocessing.fit(each)

    def explained() -> None:
        for _ in range(N_PICTURES // len(floats)):
            maps(kernel, floats)

    seconds = in_turns({"fit": fitted, "kernel": explained})
    share = ratio(seconds["fit"], seconds["kernel"])
    return Line(
        what=f"preprocessing of {N_PICTURES} pictures of 640 × 480 over a ResNet-18 kernel's time for them",
        figure=100 * share,
        unit="%",
        goal=f"< {100 * PREPROCESSING_GOAL:.0f} %",
        met=share < PREPROCESSING_GOAL,
        detail=f"{statistics.median(seconds['fit']) / N_PICTURES * 1e3:.2f} ms a picture",
    )


def _reloads(weights: Path) -> list[Line]:
    """Reload the model while callers call without a pause; compare their latencies with earlier ones."""
    image = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    with (
        server(SOURCE, "--weights", str(weights), "--allow-reload") as (address, _),
        sidelight.connect(address, retry=False) as client,
    ):
        client.attribute(image)
        quiet, n_failed = _latencies(client, image, lambda: time.sleep(QUIET_S))
        took: list[float] = []

        def reload() -> None:
            for _ in range(N_RELOADS):
                began = time.perf_counter()
                client.reload()
                took.append(time.perf_counter() - began)

        beside, n_more = _latencies(client, image, reload)
    n_failed += n_more
    times = float(np.percentile(beside, 99) / np.percentile(quiet, 99))
    return [
        Line(
            what=f"p99 of {N_CALLERS} callers while a ResNet-18 is reloaded, over their p99 before",
            figure=times,
            unit="×",
            goal=f"≤ {RELOAD_GOAL:g}",
            met=times <= RELOAD_GOAL,
            detail=f"{np.percentile(quiet, 99) * 1e3:.0f} and {np.percentile(beside, 99) * 1e3:.0f} ms; a reload took "
            f"{statistics.median(took):.1f} s beside them",
        ),
        Line(
            what=f"requests that failed of {len(quiet) + len(beside)}, {N_RELOADS} reloads among them",
            figure=n_failed,
            unit="",
            goal="0",
            met=n_failed == 0,
            detail="",
        ),
    ]


def _latencies(client: sidelight.Client, image: np.ndarray, meanwhile: Callable[[], None]) -> tuple[list[float], int]:
    """Return the seconds of each call while another function runs, and the number of failed calls."""
    over = threading.Event()
    failed: list[str] = []

    def call() -> list[float]:
        seconds = []
        while not over.is_set():
            began = time.perf_counter()
            try:
                client.attribute(image)
            except sidelight.SidelightError as error:
                failed.append(str(error))
            seconds.append(time.perf_counter() - began)
        return seconds

    with ThreadPoolExecutor(N_CALLERS) as pool, _ending(over):
        callers = [pool.submit(call) for _ in range(N_CALLERS)]
        meanwhile()
        over.set()
        return [each for caller in callers for each in caller.result()], len(failed)


@contextlib.contextmanager
def _ending(over: threading.Event) -> Iterator[None]:
    try:
        yield
    finally:
        over.set()
