"""A rival: its module, and the settings that are tried. A peer is a rival other than Sidelight.

The peers' own environments import this, so it imports only the standard library at its top.
"""

import argparse
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

Flags = tuple[str, ...]


class NotRun(Exception):
    """A peer could not run; the message has the reason."""


@dataclass(frozen=True, slots=True)
class Rival:
    """A rival. Its server and its driver get `flags`; the fastest are used."""

    name: str
    module: str
    flags: tuple[Flags, ...]
    at_once: tuple[int, ...]
    python: Path = Path(sys.executable)
    serves: bool = True
    alike: float | None = None  # the lowest rank correlation of its maps with the exact ones; None: they must be equal
    is_ours: bool = False
    goals: tuple[float, ...] = ()  # of a peer: the speedup that each of ours should have over it, in their order


@dataclass(frozen=True, slots=True)
class Setting:
    """The conditions under which a rival was measured."""

    flags: Flags
    at_once: int

    def __str__(self) -> str:
        return " ".join([*(flag.removeprefix("--") for flag in self.flags), f"{self.at_once} at once"])


def arguments(description: str | None) -> argparse.Namespace:
    """Read the command line of a rival's processes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("role", choices=("serve", "drive"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of one worker")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1, help="images that the server may put together")
    parser.add_argument("--input-only", action="store_true", help="LitServe: the input's gradient alone, not Captum")
    parser.add_argument("--delay-us", type=int, default=0, help="Triton: for which a batch waits for more images")
    parser.add_argument("--original", action="store_true", help="in process: the original class, not Captum")
    parser.add_argument("--precision", default="", help="sidelight: of the model")
    parser.add_argument("--folded", action="store_true", help="sidelight: BatchNorm folded, channels last")
    return parser.parse_args()


def free_port() -> int:
    """Return a port of this machine that is free now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port
