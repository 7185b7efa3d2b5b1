"""Serve a Hugging Face folder and explain a picture with it. Without a folder one with RANDOM weights is made first.

python examples/hugging_face.py [why.png [FOLDER [PICTURE]]]
"""

import json
import sys
import tempfile
from pathlib import Path

import sidelight
import sidelight_server
import skimage
import torch
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.utils.logging import disable_progress_bar

LABELS = ("cat", "dog", "rocket")
CHELSEA = Path(skimage.__file__).parent / "data" / "chelsea.png"


def main(out: str = "why.png", folder: str = "", picture: str = str(CHELSEA)) -> None:
    with tempfile.TemporaryDirectory() as made:
        if not folder:
            print("the weights are random: the maps show a network that was never trained")
            make(Path(made))
        with sidelight_server.serve(f"hf:{folder or made}") as address, sidelight.connect(address) as client:
            model = client.model()
            print(
                f"{model.call}, {model.outputs}; {model.class_count} classes: {', '.join((model.labels or ())[:3])}, …"
            )
            answers, names = [], []
            for method in (sidelight.Gradient(), sidelight.GradCAM()):
                answer = client.attribute(picture, method=method, score="logit")
                (prediction,) = answer.predictions
                names.append(answer.provenance.method.partition("(")[0])
                print(f"{names[-1]}: {prediction.label} {prediction.probability:.2f}")
                answers.append(answer)
            sidelight.gallery(answers, heading="From a Hugging Face folder", subtitles=names).save(out)


def make(folder: Path) -> None:
    """Write a folder as `save_pretrained` does: config with labels, safetensors, preprocessor."""
    torch.manual_seed(0)
    disable_progress_bar()
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic", id2label=dict(enumerate(LABELS))
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 224, "width": 224},
        "resample": 3,  # bicubic
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
