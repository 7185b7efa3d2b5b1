"""Sidelight compared with other ways to explain the same images by the same model: `python -m benchmarks.peers`.

The original class and Captum in process; LitServe, TorchServe and MLServer running Captum; a function served by Triton.
Each peer is a module here and runs in its own environment (`make peers`), which has neither sidelight nor most of what
`benchmarks` needs. The docstring of its module lists the imports of its process.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..support.measure import Line


def run() -> "list[Line]":
    """Run the comparison."""
    from .contest import run

    return run()
