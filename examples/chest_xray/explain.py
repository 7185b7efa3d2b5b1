"""Explain a chest-X-ray-shaped model, by the client and by PyHealth's class. Pictures and weights are SYNTHETIC.

python examples/chest_xray/explain.py why/
"""

import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import safetensors.torch
import sidelight
import sidelight_server
import torch
from chest import LABELS, MEAN, STD, network, radiograph
from sidelight.pyhealth import BasicGradientSaliencyMaps

N_SHOWN = 4
N_TRAINED = 160
N_STEPS = 120


def main(out: str) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "synthetic.safetensors"
    train(weights)
    print("pictures and weights are synthetic: nothing here is about a disease")
    rng = np.random.default_rng(1)
    sick = [bool(i % 2) for i in range(N_SHOWN)]
    pictures, spots = zip(*(radiograph(rng, sick=each) for each in sick), strict=True)
    with sidelight_server.serve("python:chest:network", weights=weights, name="chest") as address:
        by_client(address, np.stack(pictures), spots, sick, folder)
        by_pyhealth_class(address, np.stack(pictures), sick, folder)


def by_client(address: str, pictures: np.ndarray, spots: tuple, sick: list[bool], folder: Path) -> None:
    with sidelight.connect(address) as client:
        print("call:", client.model().call)
        answer = client.attribute(pictures, method=sidelight.SmoothGrad(samples=16), score="logit")
    panels = []
    for i, prediction in enumerate(answer.predictions):
        line = f"{i}: truly {LABELS[sick[i]]}, predicted {prediction.label} {prediction.probability:.2f}"
        if sick[i]:
            share = answer.maps[i][spots[i]].sum() / answer.maps[i].sum()
            line += f"; {share:.0%} of the map lies on the spot, which is {spots[i].mean():.1%} of the picture"
        print(line)
        caption = f"{prediction.label}  {prediction.probability:.2f}"
        panels.append(sidelight.Panel(answer.picture(i), answer.map(i), caption, f"truly {LABELS[sick[i]]}"))
    sidelight.gallery(panels, heading="Synthetic radiographs").save(folder / "gallery.png")


def by_pyhealth_class(address: str, pictures: np.ndarray, sick: list[bool], folder: Path) -> None:
    image = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - MEAN) / STD
    batch = {"image": image, "disease": torch.tensor(sick).long()}
    mpl.use("Agg")  # no window
    with BasicGradientSaliencyMaps(address, batch) as saliency:
        figure = saliency.visualize_saliency_map(
            plt, image_index=1, title="Synthetic", id2label=dict(enumerate(LABELS))
        )
        figure.savefig(folder / "saliency.png")


def train(path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    sick = torch.from_numpy(rng.integers(2, size=N_TRAINED))
    pixels = np.stack([radiograph(rng, sick=bool(each))[0] for each in sick])
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - MEAN) / STD
    module = network().module
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(N_STEPS):
        batch = torch.randint(N_TRAINED, (16,))
        optimiser.zero_grad()
        module(image=images[batch], disease=sick[batch])["loss"].backward()
        optimiser.step()
    safetensors.torch.save_file(module.state_dict(), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
