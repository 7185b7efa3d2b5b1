"""Files decoded in a process of their own, whose memory can be looked at."""

import subprocess
import sys
from collections.abc import Iterable

import pytest

PROGRAM = """
import importlib, resource, sys
from sidelight_server.errors import InvalidArgument
from sidelight_server.models.decoding import decode
for name in sys.argv[1:]:
    importlib.import_module(name)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for file in sys.stdin.read().split():
    try:
        decode(bytes.fromhex(file), channels=3, max_pixels=50_000_000)
    except InvalidArgument as error:
        print(error.message)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""

counts_memory = pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory in KiB, as Linux does")


def refused_apart(files: Iterable[bytes], *imported: str) -> tuple[list[str], int]:
    """Return what refused files were told, and by how many KiB memory grew; a warning is an error.

    Modules to be imported first are those whose memory is not the files'.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, *imported],
        input=" ".join(file.hex() for file in files),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    *messages, grown_kib = done.stdout.splitlines()
    return messages, int(grown_kib)
