"""The rivals, and the settings among which the best of each is chosen."""

from pathlib import Path

from sidelight_server.compute.torch_device import cpu_quota

from .rival import Rival
from .running import ROOT

_WHOLE = ("--threads", str(cpu_quota()))  # one worker with all CPUs
_SPLIT = ("--threads", "1", "--workers", str(cpu_quota()))  # one worker per CPU, so that no thread waits for another
_SERVED = ((*_WHOLE, "--batch", "8"), (*_SPLIT, "--batch", "8"), (*_SPLIT, "--batch", "1"))
_AT_ONCE = (4, 8, 16)  # concurrent calls; in process, the images of a batch


def _ours(name: str, *flags: str, alike: float | None = None) -> Rival:
    return Rival(f"Sidelight, {name}", "ours", ((*_WHOLE, *flags),), at_once=_AT_ONCE, alike=alike, is_ours=True)


OURS = (
    _ours("exact"),
    _ours("folded", "--folded", alike=0.9999),
    _ours("mixed, folded", "--folded", "--precision", "mixed", alike=0.99),
)


def _python(name: str) -> Path:
    return ROOT / f".venv-{name}" / "bin" / "python"


def _in_process(name: str, *flags: str) -> Rival:
    return Rival(name, "in_process", ((*_WHOLE, *flags),), at_once=_AT_ONCE, serves=False)


def _litserve(name: str, *flags: str, goals: tuple[float, ...]) -> Rival:
    swept = tuple((*each, *flags) for each in _SERVED)
    return Rival(name, "litserve", swept, at_once=_AT_ONCE, python=_python("litserve"), goals=goals)


PEERS = (
    _in_process("the original class, in process", "--original"),
    _in_process("Captum in one pass, in process"),
    _litserve("LitServe + Captum in one pass", goals=(1.1, 1.35, 1.5)),
    _litserve("LitServe, input-only gradient", "--input-only", goals=(1.0, 1.2, 1.4)),
    Rival(
        "TorchServe + Captum in one pass, in bytes",  # its own handlers answer in JSON, which takes much longer
        "torchserve",
        _SERVED,
        at_once=_AT_ONCE,
        python=_python("torchserve"),
        goals=(1.1, 1.35, 1.5),
    ),
    Rival(
        "MLServer + Captum in one pass",
        "mlserver",
        _SERVED,
        at_once=_AT_ONCE,
        python=_python("mlserver"),
        goals=(1.1, 1.35, 1.5),
    ),
    Rival(
        "Triton, input-only gradient",
        "triton",
        (*_SERVED, (*_WHOLE, "--batch", "8", "--delay-us", "2000"), (*_SPLIT, "--batch", "8", "--delay-us", "2000")),
        at_once=_AT_ONCE,
        python=_python("triton"),
        goals=(1.0, 1.2, 1.4),
    ),
)
