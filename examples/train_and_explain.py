"""Train a small CNN on scikit-learn's digits, serve it from this process, and draw why it read each digit as it did.

python examples/train_and_explain.py digits.png
"""

import sys

import numpy as np
import sidelight
import sidelight_server
import torch
from own_model.mine import digits
from sklearn.datasets import load_digits

N_SHOWN = 12
N_STEPS = 300


def main(path: str) -> None:
    data = load_digits()
    images = (data.images * 255 / 16).astype(np.uint8)[..., None]  # [N, 8, 8, 1]
    spec = digits()
    train(spec.module, torch.from_numpy(images), torch.from_numpy(data.target))
    with sidelight_server.serve(spec) as address, sidelight.connect(address) as client:
        answer = client.attribute(images[:N_SHOWN])
    right = sum(each.index == label for each, label in zip(answer.predictions, data.target, strict=False))
    print(f"{right} of {N_SHOWN} read right")
    titles = [f"read as {each.label}  {each.probability:.2f}" for each in answer.predictions]
    truths = [f"truly {label}" for label in data.target[:N_SHOWN]]
    sidelight.gallery(answer, heading="Why a digit is that digit", titles=titles, subtitles=truths).save(path)


def train(module: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    torch.manual_seed(0)
    inputs = pixels.permute(0, 3, 1, 2).float() / 255
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(N_STEPS):
        batch = torch.randint(len(inputs), (64,))
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs[batch]), labels[batch]).backward()
        optimiser.step()


if __name__ == "__main__":
    main(*sys.argv[1:])
