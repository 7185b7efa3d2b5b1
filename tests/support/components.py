"""Components that some tests need and not every machine has: `@pytest.mark.requires("envoy")`.

Such a test is skipped where its component is missing, unless the run names it: with `--require=envoy` it fails.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from support import ROOT

ENVOY = ROOT / ".envoy" / "envoy" / "_bin" / "envoy"
HELM = ROOT / ".helm" / "helm" / "helm"
INFERENCE = ROOT / ".venv-inference"
TRITON_SERVER = ROOT / ".venv-triton"
INTEROP = ROOT / ".interop"
FLOOR = ROOT / ".venv-floor" / "bin" / "python"
PYHEALTH = ROOT / ".venv-pyhealth"
SERVE = ROOT / ".venv-serve"
# The extra onnx lies beside the environment: torchvision, which comes with it, would change what transformers imports.
ONNX = Path(sys.prefix) / "onnx"


@dataclass(frozen=True)
class Component:
    """A program or package that may be missing, and what brings it."""

    is_there: Callable[[], bool]
    hint: str


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _runs_triton() -> bool:
    return _is_installed("triton") and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")


COMPONENTS = {
    "chromium": Component(
        lambda: (
            bool(shutil.which("chromium")) and _is_installed("playwright") and _is_installed("axe_playwright_python")
        ),
        "apt-get install chromium, then make browser",
    ),
    **{
        name: Component((INTEROP / name / ".ready").exists, "make interop builds the example clients")
        for name in ("node", "go", "java", "cpp")
    },
    "dciodvfy": Component(lambda: shutil.which("dciodvfy") is not None, "apt-get install dicom3tools"),
    "envoy": Component(ENVOY.exists, "make envoy brings the proxy"),
    "floor": Component(FLOOR.exists, "make setup makes the environment of the oldest versions"),
    "helm": Component(HELM.exists, "make helm brings it"),
    "inference": Component(
        (INFERENCE / ".ready").exists, "make inference makes the environment of the clients of Triton and KServe"
    ),
    "kubernetes": Component(lambda: _is_installed("kubernetes_validate"), "pip install kubernetes-validate"),
    "onnx": Component((ONNX / "onnx2torch").is_dir, "make setup brings onnx2torch"),
    "pandas": Component(lambda: _is_installed("pandas"), "pip install pandas"),
    "prometheus": Component(
        lambda: bool(shutil.which("prometheus") and shutil.which("promtool")), "apt-get install prometheus"
    ),
    "pyhealth": Component((PYHEALTH / ".ready").exists, "make pyhealth makes the environment of the whole of PyHealth"),
    "serve": Component((SERVE / ".ready").exists, "make scale makes the environment of Ray Serve"),
    "torchvision": Component((ONNX / "torchvision").is_dir, "make setup brings torchvision"),
    "triton_server": Component(
        (TRITON_SERVER / ".ready").exists, "make .venv-triton/.ready makes the environment of a Triton"
    ),
    "triton": Component(_runs_triton, "pip install triton; without a GPU also TRITON_INTERPRET=1"),
}
