"""Explain a chest-X-ray-shaped model, by the client and by PyHealth's class. Pictures and weights are SYNTHETIC.

python examples/chest_xray/explain.py [why/]
"""

import importlib.util
import sys
import tomllib
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import safetensors.torch
import sidelight
import sidelight_server
import torch
from chest import network, radiograph
from sidelight.pyhealth import BasicGradientSaliencyMaps

HERE = Path(__file__).parent
CHEST = tomllib.loads((HERE / "sidelight.toml").read_text())["models"]["chest"]
LABELS = (HERE / CHEST["class_names"]).read_text().splitlines()
N_SHOWN = 4
N_TRAINED = 200
N_STEPS = 200


def main(out: str = "why") -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / CHEST["weights"]
    train(weights)
    print("pictures and weights are synthetic: nothing here is about a disease")
    rng = np.random.default_rng(2)
    sick = [bool(i % 2) for i in range(N_SHOWN)]
    pictures, spots = map(np.stack, zip(*(radiograph(rng, sick=each) for each in sick), strict=True))
    settings = CHEST | {"name": "chest", "weights": weights, "class_names": HERE / CHEST["class_names"]}
    with sidelight_server.serve(**settings) as address, sidelight.connect(address) as client:
        by_client(client, pictures, spots, sick, folder)
        by_pyhealth_class(client, pictures, spots, sick, folder)
        if importlib.util.find_spec("pydicom"):
            by_dicom_file(client, pictures[-1], folder)


def by_client(client: sidelight.Client, pictures: np.ndarray, spots: np.ndarray, sick: list[bool], out: Path) -> None:
    print("call:", client.model().call)
    answer = client.attribute(pictures, method=sidelight.SmoothGrad(samples=16), score="logit")
    for i, prediction in enumerate(answer.predictions):
        why = f"; {on_spot(answer.maps[i], spots[i])}" if sick[i] else ""
        print(f"{i}: truly {LABELS[sick[i]]}, predicted {prediction.label} {prediction.probability:.2f}{why}")
    truths = [f"truly {LABELS[each]}" for each in sick]
    sidelight.gallery(answer, heading="Synthetic radiographs", subtitles=truths).save(out / "gallery.png")


def by_pyhealth_class(
    client: sidelight.Client, pictures: np.ndarray, spots: np.ndarray, sick: list[bool], out: Path
) -> None:
    batch = {"image": inputs(pictures), "disease": torch.tensor(sick).long()}
    mpl.use("Agg")  # no window
    with BasicGradientSaliencyMaps(client, batch) as saliency:
        (record,) = saliency.get_gradient_saliency_maps()
        print("PyHealth's class, picture 1:", on_spot(record["saliency"][1].numpy(), spots[1]))
        figure = saliency.visualize_saliency_map(
            plt, image_index=1, title="Synthetic", id2label=dict(enumerate(LABELS))
        )
        figure.savefig(out / "saliency.png")


def by_dicom_file(client: sidelight.Client, picture: np.ndarray, out: Path) -> None:
    """Explain a picture as it comes from a hospital's archive: 12 bits, and a window that says what to show of them."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    dataset = Dataset()
    dataset.PatientName = "Synthetic^Nobody"
    dataset.SOPClassUID, dataset.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    dataset.WindowCenter, dataset.WindowWidth = 1000 + 255 * 4, 255 * 8
    values = 1000 + 8 * picture[..., 0].astype(np.uint16)
    dataset.set_pixel_data(values, "MONOCHROME2", bits_stored=12)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(out / "synthetic.dcm", enforce_file_format=True)
    answer = client.attribute(out / "synthetic.dcm")
    (prediction,) = answer.predictions
    print(f"synthetic.dcm: predicted {prediction.label} {prediction.probability:.2f}")
    answer.overlay(0, original=True).save(out / "dicom.png")


def on_spot(saliency: np.ndarray, spot: np.ndarray) -> str:
    return f"{saliency[spot].sum() / saliency.sum():.0%} of the map lies on the spot, {spot.mean():.1%} of the picture"


def inputs(pictures: np.ndarray) -> torch.Tensor:
    """Return pictures as the model takes them: of pixels and files the server makes the same."""
    mean, std = (torch.tensor(CHEST[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std  # [N, 1, 224, 224]


def train(path: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # steps of so small a network only wait for each other's threads
    rng = np.random.default_rng(0)
    sick = torch.from_numpy(rng.integers(2, size=N_TRAINED))
    images = inputs(np.stack([radiograph(rng, sick=bool(each))[0] for each in sick]))
    module = network()
    optimiser = torch.optim.Adam(module.parameters(), lr=5e-3)
    for _ in range(N_STEPS):
        batch = torch.randint(N_TRAINED, (16,))
        optimiser.zero_grad()
        module(image=images[batch], disease=sick[batch])["loss"].backward()
        optimiser.step()
    safetensors.torch.save_file(module.state_dict(), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
