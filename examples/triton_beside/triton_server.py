"""Serve a TorchScript file of a model repository in a Triton: `triton_server.py REPOSITORY NAME PORT`.

Run it where nvidia-pytriton and torch are installed. In a full Triton, its backend for PyTorch does the same from the
repository alone; the one in nvidia-pytriton has the Python backend.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def main(repository: Path, name: str, port: int) -> None:
    torch.set_num_threads(1)
    module = torch.jit.load(str(repository / name / "1" / "model.pt")).eval()

    @batch
    def classify(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return {"scores": module(torch.from_numpy(images)).numpy()}

    addresses = TritonConfig(grpc_address="127.0.0.1", grpc_port=port, allow_http=False, allow_metrics=False)
    with Triton(config=addresses) as triton:
        triton.bind(
            model_name=name,
            infer_func=classify,
            inputs=[Tensor(name="images", dtype=np.float32, shape=(1, 8, 8))],
            outputs=[Tensor(name="scores", dtype=np.float32, shape=(10,))],
            config=ModelConfig(max_batch_size=256),
        )
        triton.serve()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
