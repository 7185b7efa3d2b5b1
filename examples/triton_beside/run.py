"""Triton and Sidelight on the same model repository: classes of the one, maps of the other, and what differs.

python examples/triton_beside/run.py TRITON_PYTHON CLIENT_PYTHON

TRITON_PYTHON has nvidia-pytriton and torch (`make .venv-triton/.ready`), CLIENT_PYTHON has tritonclient and sidelight.
The file is replaced halfway: Sidelight loads it again and Triton does not, which the mismatches tell.
"""

import contextlib
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sidelight
import sidelight_server
import torch
from sklearn.datasets import load_digits
from torch import nn

NAME = "digits"
HERE = Path(__file__).parent


def main(triton_python: str, client_python: str) -> None:
    data = load_digits()
    images = (data.images / 16).astype(np.float32)[:, None]  # [N, 1, 8, 8]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / NAME / "1" / "model.pt"  # as Triton lays it out
        file.parent.mkdir(parents=True)
        write(file, images, data.target, steps=300)
        np.save(Path(folder) / "images.npy", images)
        source = {"model": f"torchscript:{file}", "name": NAME, "input_size": (1, 8, 8), "allow_reload": True}
        with (
            serving_triton(triton_python, folder) as triton,
            sidelight_server.serve(**source) as address,
            sidelight.connect(address) as client,
        ):
            command = [client_python, HERE / "service.py", f"{folder}/images.npy", triton, address]
            subprocess.run(command, check=True)
            write(file, images, data.target, steps=30)
            print(f"another file: Sidelight serves version {client.reload(NAME).version}, Triton the one before")
            subprocess.run(command, check=True)


def write(file: Path, images: np.ndarray, labels: np.ndarray, *, steps: int) -> None:
    """Train a small network and save it as TorchScript."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    inputs, classes = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(inputs[batch]), classes[batch]).backward()
        optimizer.step()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # it is what Triton's backend reads
        torch.jit.trace(module.eval(), inputs[:1]).save(str(file))


@contextlib.contextmanager
def serving_triton(python: str, repository: str) -> Iterator[str]:
    """Run Triton as a process of its own; give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, HERE / "triton_server.py", repository, NAME, str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"127.0.0.1:{port}"  # the service waits for it
        finally:
            process.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
