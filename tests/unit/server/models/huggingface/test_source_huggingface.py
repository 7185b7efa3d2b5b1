"""Sources: `hf:DIR`, folders as transformers writes them."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
import skimage
import torch
from PIL import Image
from sidelight_server.config.model_settings import ModelSettings
from sidelight_server.models import sources
from sidelight_server.models.model import Model
from transformers import (
    MobileViTConfig,
    MobileViTForImageClassification,
    PreTrainedModel,
)
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from support.components import ONNX
from support.models.sources import assert_serves, examples, expected_maps, refusal, served_maps
from support.models.transformers_folders import LABELS, convnext, resnet, vit, write

pytestmark = pytest.mark.slow

PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "chelsea.png"  # 300 × 451


def mobilevit() -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {"image_size": 64, "hidden_sizes": [8] * 3, "neck_hidden_sizes": [8] * 7, "num_attention_heads": 1}
    settings |= {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    module = MobileViTForImageClassification(MobileViTConfig(**settings)).train()
    for each in module.modules():
        if isinstance(each, torch.nn.BatchNorm2d):
            each.momentum = 1.0
    with torch.no_grad():  # untrained it is so deep that no gradient comes through, unless each layer is normalized
        module(torch.rand(8, 3, 64, 64))
    return module.eval()


def loaded(folder: Path) -> Model:
    return Model(sources.load(f"hf:{folder}").completed(ModelSettings().traits()), device=torch.device("cpu"))


def test_a_network_of_bgr_is_explained_in_rgb(tmp_path: Path) -> None:
    module = mobilevit()
    processor = MobileViTImageProcessorPil(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64})
    folder = write(tmp_path / "net", module, processor)
    pixels = np.array(Image.open(PHOTOGRAPH))[:73, :93]
    pixels[..., 0] //= 4  # so that red and blue have little in common
    bgr = torch.from_numpy(np.stack(processor(Image.fromarray(pixels))["pixel_values"])).float().requires_grad_()
    logits = module(bgr).logits
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), bgr)
    with sidelight_server.serve(f"hf:{folder}", device="cpu") as address, sidelight.connect(address) as client:
        answer = client.attribute(pixels[None], score="logit", channels="none")
        layers, digest = client.model().layers, client.model().digest
    assert answer.predictions[0].index == logits.argmax().item()
    expected = gradient.flip(1).numpy()
    np.testing.assert_allclose(answer.maps, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(answer.maps - gradient.numpy()).max() > 0.1 * np.abs(expected).max()
    assert "mobilevit.conv_stem" in layers  # as transformers names it
    processor.do_flip_channel_order = False
    processor.save_pretrained(folder)
    assert loaded(folder).digest != digest


def test_a_folder_is_served_with_its_labels(tmp_path: Path) -> None:
    module = vit()
    folder = write(tmp_path / "net", module, ViTImageProcessorPil(size={"height": 48, "width": 48}))
    spec = sources.load(f"hf:{folder}")
    assert (spec.name, spec.class_names, spec.activation) == ("net", tuple(LABELS.values()), "softmax")
    assert (spec.input, spec.output_key, spec.output_kind) == ("pixel_values", "logits", "logits")
    assert_serves(f"hf:{folder}", lambda x: module(pixel_values=x).logits, examples(3, (3, 48, 48)))


@pytest.mark.parametrize("made", [convnext, resnet], ids=["convnext", "resnet"])
def test_a_folder_without_a_processor_takes_arrays(made: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    module = made()
    source = f"hf:{write(tmp_path, module)}"
    assert sources.load(source).mean is None
    shape = sources.load(source).input_size or (3, 64, 64)
    assert_serves(source, lambda x: module(x).logits, examples(2, shape))


def test_classes_that_do_not_exclude_each_other_are_read_by_a_sigmoid(tmp_path: Path) -> None:
    module = vit(problem_type="multi_label_classification")
    source = f"hf:{write(tmp_path, module)}"
    assert sources.load(source).activation == "sigmoid"
    x = examples(2, (3, 48, 48)).requires_grad_()
    scores = module(x).logits.sigmoid().amax(1)
    expected = torch.autograd.grad(scores.sum(), x)[0].abs().amax(1).numpy()
    np.testing.assert_allclose(served_maps(source, x.detach()), expected, rtol=0, atol=1e-5 * expected.max())
    assert np.abs(expected - expected_maps(lambda x: module(x).logits, x.detach())).max() > 0.01 * expected.max()


def test_weights_only_pickles_are_read_where_there_is_no_safetensors(tmp_path: Path) -> None:
    module = vit()
    write(tmp_path, module)
    (tmp_path / "model.safetensors").unlink()
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    x = examples(2, (3, 48, 48))
    loaded = sources.load(f"hf:{tmp_path}").module
    assert torch.equal(loaded(pixel_values=x).logits, module(x).logits)


def test_without_the_extra_a_line_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    assert refusal("hf:net") == "hf: needs the extra: pip install 'sidelight[hf]'"


def test_an_exported_classifier_is_served_where_nobody_has_imported_transformers(tmp_path: Path) -> None:
    module, x = vit(), examples(3, (3, 48, 48))
    with warnings.catch_warnings(action="ignore"):
        program = torch.export.export(module, (x,), dynamic_shapes={"pixel_values": {0: torch.export.Dim.AUTO}})
        torch.export.save(program, tmp_path / "vit.pt2")
    source = f"export:{tmp_path}/vit.pt2"
    code = f"from sidelight_server.models import sources; print(sources.load({source!r}).input_size)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "(3, 48, 48)\n"
    assert_serves(source, lambda x: module(x).logits, x)


@pytest.mark.requires("torchvision")
def test_a_folder_is_served_beside_a_torchvision_that_does_not_fit(tmp_path: Path) -> None:
    module = vit()
    folder = write(tmp_path / "net", module, ViTImageProcessorPil(size={"height": 48, "width": 48}))
    code = "import json, torch; from sidelight_server.models import sources\n"
    code += f"module = sources.load('hf:{folder}').module\n"
    code += "print(json.dumps(module(torch.ones(1, 3, 48, 48)).logits.tolist()))"
    path = os.pathsep.join([str(ONNX), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": path}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stderr
    torch.testing.assert_close(torch.tensor(json.loads(ran.stdout)), module(torch.ones(1, 3, 48, 48)).logits)


def test_every_file_of_a_folder_is_watched(tmp_path: Path) -> None:
    folder = write(tmp_path / "net", vit(), ViTImageProcessorPil())
    names = {each.name for each in sources.files(f"hf:{folder}")}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= names


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("good") / "net", vit(), ViTImageProcessorPil(size={"height": 48, "width": 48}))


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(good, tmp_path / "net"))


def change(name: str, **changes: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        held = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(held))

    return make


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:50])


class Malicious:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.touch, (Path("mark"),)


def malicious(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"classifier.bias": Malicious()}, folder / "pytorch_model.bin")


def malicious_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))


def code(folder: Path) -> None:
    (folder / "own.py").write_text("open('mark', 'w')\n")
    change("config.json", auto_map={"AutoModelForImageClassification": "own.Net"})(folder)


def drop(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return make


def processor(**changes: object) -> Callable[[Path], None]:
    return change("preprocessor_config.json", **changes)


REFUSALS: Mapping[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no folder": (lambda folder: shutil.rmtree(folder), ("model: net does not exist",)),
    "a file": (
        lambda folder: (shutil.rmtree(folder), folder.write_text("")),
        ("model: net is a file, expected a folder",),
    ),
    "no config": (drop("config.json"), ("model: net/config.json does not exist",)),
    "no weights": (drop("model.safetensors"), ("model: net: holds no weights, expected model.safetensors",)),
    "half of the config": (cut("config.json"), ("model: net/config.json: ",)),
    "half of the weights": (cut("model.safetensors"), ("model: net: ", "header")),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), ("net/config.json: holds list",)),
    "no kind of model": (change("config.json", model_type="nothing"), ("model: net: ", "nothing")),
    "a model of texts": (change("config.json", model_type="bert"), ("model: net: ", "BertConfig")),
    "weights of another shape": (
        change("config.json", hidden_size=24),
        ("model: net: its weights have ", "its config.json expects "),
    ),
    "an adapter": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        ("net/adapter_config.json: changes a model that is elsewhere",),
    ),
    "weights that are missing": (change("config.json", num_hidden_layers=3), ("model: net: its weights lack vit.",)),
    "code of its own": (code, ("net/config.json: auto_map: requires code from the folder, which never runs",)),
    "code in weights": (malicious, ("model: net: ", "code in a file is never run")),
    "code in a pickle": (malicious_pickle, ("model: net: ",)),
    "classes with a gap": (change("config.json", id2label={"0": "a", "2": "b"}), ("net/config.json: id2label: ",)),
    "half of the processor": (cut("preprocessor_config.json"), ("net/preprocessor_config.json: ",)),
    "another processor": (
        processor(image_processor_type="OwlViTImageProcessor"),
        ("net/preprocessor_config.json: image_processor_type: got 'OwlViTImageProcessor'", "LevitImageProcessor"),
    ),
    "a crop that is filled up": (
        processor(image_processor_type="MobileViTImageProcessor", size={"shortest_edge": 224}, crop_size=256),
        ("crop_size: got 256, expected 224 × 224 at most", "padded; or, without this file, set input_size"),
    ),
    "multiples of 32": (
        processor(image_processor_type="TextNetImageProcessor", size={"shortest_edge": 640}, do_center_crop=True),
        ("preprocessor_config.json: size_divisor: got 32, expected 1",),
    ),
    "BGR of a class that knows none": (
        processor(image_processor_type="BeitImageProcessor", do_flip_channel_order=True),
        ("do_flip_channel_order: got True, expected false",),
    ),
    "an offset of a class that knows none": (processor(rescale_offset=True), ("rescale_offset: got True",)),
    "a processor that pads": (processor(do_pad=True), ("net/preprocessor_config.json: do_pad: got True",)),
    "turned channels": (processor(do_flip_channel_order=True), ("do_flip_channel_order: got True",)),
    "pictures of any size": (processor(do_resize=False), ("preprocessor_config.json: do_resize: got False",)),
    "a short side only": (processor(size={"shortest_edge": 48}), ("preprocessor_config.json: size: got ",)),
    "the longest side": (processor(size={"longest_edge": 48}), ("preprocessor_config.json: size: got ",)),
    "a crop of more than the warped": (
        processor(do_center_crop=True, crop_size={"height": 32, "width": 64}),
        ("preprocessor_config.json: crop_size: got ", "48 × 48 at most"),
    ),
    "an unknown filter": (processor(resample=9), ("preprocessor_config.json: resample: got 9, expected one of 0, 1",)),
    "means of two channels": (processor(image_mean=[0.5, 0.5]), ("image_mean: got [0.5, 0.5], expected 3 numbers",)),
    "a mean that is a text": (processor(image_mean="gray"), ("preprocessor_config.json: ",)),
}


@pytest.mark.parametrize(("make", "fragments"), REFUSALS.values(), ids=REFUSALS)
def test_a_folder_that_cannot_be_served_is_refused(
    make: Callable[[Path], None], fragments: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    make(folder)
    message = refusal("hf:net")
    assert message.startswith("model: net")
    for fragment in fragments:
        assert fragment in message
    assert not (tmp_path / "mark").exists()
