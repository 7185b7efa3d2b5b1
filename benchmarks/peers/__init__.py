"""Sidelight against others who explain the same images by the same model: `python -m benchmarks.peers`.

The original class and Captum in process, LitServe and TorchServe with Captum behind them, a function bound in a Triton.
A peer is a module here. Each runs in an environment of its own (`make peers`), which has neither sidelight nor most of
what `benchmarks` needs: what a peer's process imports is said at the top of its module.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..support.measure import Line


def run() -> "list[Line]":
    """Hold the contest."""
    from .contest import run

    return run()
