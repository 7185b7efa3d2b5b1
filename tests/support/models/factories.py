"""Files of models that a server process loads: good ones, broken ones, and one with code."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import safetensors.torch
import torch
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc
from torch import nn

from support.messages.attribution import ask
from support.servers.processes import FACTORIES
from support.servers.running import TIMEOUT_S

MARK = "code-that-a-file-brought-was-run"


class Malicious:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (MARK,)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))


def write_files(folder: Path) -> None:
    (folder / "factories.py").write_text(FACTORIES)
    (folder / "absent_import.py").write_text("import nothing_of_this_name\n")
    (folder / "no_python.py").write_text("def f(:\n")
    (folder / "script.py").write_text("raise SystemExit(0)\n")
    (folder / "two.txt").write_text("a\nb\n")
    state = net().state_dict()
    torch.save(state, folder / "good.pt")
    safetensors.torch.save_file(state, folder / "good.safetensors")
    for name in ("good.pt", "good.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name.replace("good", "half")).write_bytes(whole[: len(whole) // 2])
    torch.save({"1.weight": torch.zeros(5, 48), "2.bias": torch.zeros(5)}, folder / "others.pt")
    safetensors.torch.save_file({"1.weight": torch.zeros(5, 40)}, folder / "others.safetensors")
    torch.save({"1.weight": Malicious()}, folder / "malicious.pt")
    (folder / "malicious_pickle.pt").write_bytes(pickle.dumps({"1.weight": Malicious()}))
    torch.save([torch.zeros(1)], folder / "list.pt")
    torch.save({1: torch.zeros(1)}, folder / "numbered.pt")
    (folder / "empty.pt").touch()
    (folder / "empty.safetensors").touch()
    (folder / "junk.pt").write_bytes(b"junkjunk")
    (folder / "weights.onnx").write_bytes(b"\0")
    (folder / "plain").write_text("precious")


def ask_net(address: str) -> pb.AttributeResponse:
    with grpc.insecure_channel(address) as channel:
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        images = np.random.default_rng(0).integers(0, 256, (2, 9, 8, 3), np.uint8)
        return stub.Attribute(ask(images), timeout=TIMEOUT_S, wait_for_ready=True)
