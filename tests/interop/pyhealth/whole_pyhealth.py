"""All of PyHealth compared with the drop-in class, in the environment that `make pyhealth` makes.

As a program it explains one of PyHealth's own models, on a data set of PyHealth's own, by both classes, and fails where
they differ. A process of its own: the tests' environment has PyHealth without what it depends on.
"""

import torch

# torchvision's compiled operators are not there for every build of torch; their names must be, or it is not imported.
_NAMES = torch.library.Library("torchvision", "FRAGMENT")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    _NAMES.define(_schema)

import matplotlib as mpl  # noqa: E402

mpl.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402
from pyhealth.datasets import create_sample_dataset, get_dataloader  # noqa: E402
from pyhealth.interpret.methods.basic_gradient import BasicGradientSaliencyMaps as Original  # noqa: E402
from pyhealth.models import TorchvisionModel  # noqa: E402
from sidelight.pyhealth import BasicGradientSaliencyMaps  # noqa: E402

N, SIZE = 6, 64
LABELS = {
    "binary": [i % 2 for i in range(N)],
    "multiclass": [("Normal", "COVID", "Pneumonia")[i % 3] for i in range(N)],
    "multilabel": [("Effusion", "Nodule", "Mass")[: 1 + i % 3] for i in range(N)],
}


def compare(mode: str) -> None:
    """Explain one batch of a model of this mode by both classes."""
    torch.manual_seed(0)
    images = torch.rand(N, 1 if mode == "binary" else 3, SIZE, SIZE)
    samples = [
        {"patient_id": f"p{i}", "visit_id": f"v{i}", "image": images[i].tolist(), "disease": label}
        for i, label in enumerate(LABELS[mode])
    ]
    dataset = create_sample_dataset(
        samples=[each | {"disease": list(each["disease"])} if mode == "multilabel" else each for each in samples],
        input_schema={"image": "tensor"},
        output_schema={"disease": mode},
        dataset_name=f"whole_{mode}",
    )
    model = TorchvisionModel(dataset, "resnet18", {"weights": None}).eval()
    batch = next(iter(get_dataloader(dataset, batch_size=N, shuffle=False)))
    expected = Original(model, input_batch=batch)
    model.train()
    model.zero_grad()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with BasicGradientSaliencyMaps(model, input_batch=batch) as ours:
        assert repr(ours) == repr(expected)
        (record,), (theirs,) = ours.get_gradient_saliency_maps(), expected.get_gradient_saliency_maps()
        assert record["saliency"].abs().max() > 0
        assert torch.equal(record["saliency"], theirs["saliency"]), mode
        assert torch.equal(record["image"], theirs["image"])
        assert torch.equal(record["label"], theirs["label"])
        unlabelled = ours.attribute(image=batch["image"])["image"]
        assert torch.equal(unlabelled, theirs["saliency"])
        figure = ours.visualize_saliency_map(plt, image_index=1, id2label={0: "Normal", 1: "COVID"})
        print(f"{mode}: {tuple(record['saliency'].shape)} equal to the last bit; {figure.axes[0].get_title()!r}")
    assert model.training
    assert all(each.grad is None and each.requires_grad for each in model.parameters())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


if __name__ == "__main__":
    for each in LABELS:
        compare(each)
