"""Clients of Triton and KServe, unchanged, each in a process of its own: their maps are our client's, to the byte."""

import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
from PIL import Image
from sidelight.methods import IntegratedGradients

from support.certificates import Authority, secret
from support.components import INFERENCE
from support.models import sized_cnn

WITHIN_S = 90.0
PROGRAMS = Path(__file__).parent
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)

pytestmark = pytest.mark.requires("inference")


def found_by(program: str, folder: Path, *arguments: str) -> Mapping[str, np.ndarray]:
    """Run another project's client on the images of a folder; return the maps that it saved."""
    np.save(folder / "images.npy", PIXELS)
    for index, each in enumerate(PIXELS):
        Image.fromarray(each).save(folder / f"{index}.png")
    command = [INFERENCE / "bin" / "python", PROGRAMS / program, arguments[0], folder, *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "found.npz")


def own_maps(address: str, **options: object) -> bytes:
    with sidelight.connect(address, **options) as client:
        return client.attribute(PIXELS, model="small", method=IntegratedGradients(steps=8)).maps.tobytes()


def serving(**settings: object) -> sidelight_server.EmbeddedServer:
    listen = ("127.0.0.1:0",)
    return sidelight_server.serve(
        sized_cnn(), listen=listen, device="cpu", threads=1, reproducible=True, shared_memory="/dev/shm", **settings
    )


def test_a_client_of_triton_gets_our_maps(tmp_path: Path) -> None:
    with serving() as address:
        found = found_by("triton_client.py", tmp_path, address)
        ours = own_maps(address)
    assert set(found) == {"unary", "files", "stream", "shared", "aio"}
    assert {name for name, maps in found.items() if maps.tobytes() != ours} == set()


def test_a_client_of_kserve_gets_our_maps(tmp_path: Path) -> None:
    with serving() as address:
        found = found_by("kserve_client.py", tmp_path, address)
        ours = own_maps(address)
    assert set(found) == {"array", "list"}
    assert {name for name, maps in found.items() if maps.tobytes() != ours} == set()


def test_a_client_of_triton_sends_a_token_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    pair = authority.pair()
    tokens = secret(tmp_path / "tokens", "user-5f2a\n")
    with serving(tls_certificate=pair.certificate, tls_key=pair.key, tokens=tokens) as address:
        found = found_by("triton_client.py", tmp_path, address, "user-5f2a", str(authority.path))
        ours = own_maps(address, tls=str(authority.path), token="user-5f2a")
    assert found["unary"].tobytes() == found["shared"].tobytes() == ours
