"""The field: who takes part, and under which settings each may show its best."""

from pathlib import Path

from sidelight_server.compute.torch_device import cpu_quota

from .rival import Rival
from .running import ROOT

_WHOLE = ("--threads", str(cpu_quota()))  # one worker that has all CPUs
_SPLIT = ("--threads", "1", "--workers", str(cpu_quota()))  # a worker for each CPU: no thread waits for another
_SERVED = ((*_WHOLE, "--batch", "8"), (*_SPLIT, "--batch", "8"), (*_SPLIT, "--batch", "1"))
_AT_ONCE = (4, 8, 16)  # calls, or in process the images of a batch

OURS = Rival("Sidelight, float32", "ours", (_WHOLE,), at_once=_AT_ONCE, is_ours=True)
FAST = Rival(
    "Sidelight, bfloat16, folded, channels last",
    "ours",
    ((*_WHOLE, "--fast"),),
    at_once=_AT_ONCE,
    exact=False,
    is_ours=True,
)


def _python(name: str) -> Path:
    return ROOT / f".venv-{name}" / "bin" / "python"


PEERS = (
    Rival(
        "the original class, in process",
        "in_process",
        ((*_WHOLE, "--original"),),
        at_once=_AT_ONCE,
        serves=False,
        goal=1.0,
    ),
    Rival("Captum, in process", "in_process", (_WHOLE,), at_once=_AT_ONCE, serves=False, goal=1.0),
    Rival(
        "LitServe + Captum",
        "litserve",
        (
            (*_WHOLE, "--batch", "8"),
            (*_SPLIT, "--batch", "8"),
            (*_SPLIT, "--batch", "1"),
        ),
        at_once=_AT_ONCE,
        python=_python("litserve"),
        goal=1.4,
    ),
    Rival(
        "TorchServe + Captum, in bytes",
        "torchserve",
        (
            (*_WHOLE, "--batch", "8"),
            (*_SPLIT, "--batch", "8"),
            (*_SPLIT, "--batch", "1"),
        ),
        at_once=_AT_ONCE,
        python=_python("torchserve"),
        goal=2.0,
    ),
    Rival(
        "TorchServe + Captum, in JSON",  # as its own handlers answer
        "torchserve",
        tuple((*flags, "--json") for flags in _SERVED[1:]),
        at_once=_AT_ONCE,
        python=_python("torchserve"),
        goal=2.0,
    ),
    Rival(
        "Triton, input-only gradient",
        "triton",
        (
            (*_WHOLE, "--batch", "8"),
            (*_SPLIT, "--batch", "8"),
        ),
        at_once=_AT_ONCE,
        python=_python("triton"),
        goal=0.97,
    ),
)
