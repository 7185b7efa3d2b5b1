"""Preprocessing of Hugging Face folders, compared with transformers' own processors."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from sidelight_server.config.model_settings import ModelSettings
from sidelight_server.models import sources
from sidelight_server.models.model import Model
from transformers import (
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.levit.image_processing_pil_levit import LevitImageProcessorPil
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
from transformers.models.poolformer.image_processing_pil_poolformer import PoolFormerImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.textnet.image_processing_pil_textnet import TextNetImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from support.models.transformers_folders import convnext, resnet, vit, write

pytestmark = pytest.mark.slow

PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "chelsea.png"  # 300 × 451
# Of a photograph: whole, and parts of other shapes, whose margins are odd in every way once they are resized.
SIZES = [(300, 451), (299, 211), (200, 203), (57, 91), (61, 44), (300, 100)]


FOLDERS: Mapping[str, Callable[[], tuple[PreTrainedModel, object]]] = {
    "vit": lambda: (vit(), ViTImageProcessorPil(size={"height": 48, "width": 48})),
    "vit of another shape": lambda: (vit(image_size=[32, 48]), ViTImageProcessorPil(size={"height": 32, "width": 48})),
    "vit, pixels from 0 to 255": lambda: (
        vit(),
        ViTImageProcessorPil(
            size={"height": 48, "width": 48}, do_rescale=False, image_mean=[120.0] * 3, image_std=[60.0] * 3
        ),
    ),
    "vit, pixels from 0 to 2, unnormalized": lambda: (
        vit(),
        ViTImageProcessorPil(size={"height": 48, "width": 48}, rescale_factor=2 / 255, do_normalize=False, resample=3),
    ),
    "vit by CLIP's crop": lambda: (
        vit(),
        CLIPImageProcessorPil(size={"shortest_edge": 60}, crop_size={"height": 48, "width": 48}),
    ),
    "convnext": lambda: (convnext(), ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.8)),
    "convnext, warped": lambda: (convnext(), ConvNextImageProcessorPil(size={"shortest_edge": 384})),
    "resnet": lambda: (resnet(), ConvNextImageProcessorPil(size={"shortest_edge": 224}, crop_pct=0.875)),
}


@pytest.mark.parametrize("made", FOLDERS.values(), ids=FOLDERS)
def test_a_photograph_becomes_what_transformers_makes_of_it(
    made: Callable[[], tuple[PreTrainedModel, object]], tmp_path: Path
) -> None:
    module, processor = made()
    spec = sources.load(f"hf:{write(tmp_path / 'net', module, processor)}")
    model = Model(spec.completed(ModelSettings().traits()), device=torch.device("cpu"))
    assert_prepares_as(model, processor)


# Processors by themselves, in a folder of a network that takes pictures of any size.
PROCESSORS: Mapping[str, Callable[[], object]] = {
    "vit, a crop of the warped": lambda: ViTImageProcessorPil(
        size={"height": 64, "width": 72}, do_center_crop=True, crop_size={"height": 37, "width": 48}
    ),
    "deit": DeiTImageProcessorPil,
    "deit, an odd crop": lambda: DeiTImageProcessorPil(crop_size={"height": 225, "width": 223}),
    "clip, an odd crop": lambda: CLIPImageProcessorPil(
        size={"shortest_edge": 60}, crop_size={"height": 47, "width": 49}
    ),
    "convnext, odd": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 97}, crop_pct=0.9),
    "levit": LevitImageProcessorPil,
    "levit, smaller": lambda: LevitImageProcessorPil(size={"shortest_edge": 99}, crop_size=[100, 97]),
    "levit, warped": lambda: LevitImageProcessorPil(size={"height": 240, "width": 250}),
    "poolformer": PoolFormerImageProcessorPil,
    "poolformer of 95 %": lambda: PoolFormerImageProcessorPil(crop_pct=0.95),
    "poolformer, a square": lambda: PoolFormerImageProcessorPil(size={"height": 224, "width": 224}),
    "poolformer, warped": lambda: PoolFormerImageProcessorPil(size={"height": 224, "width": 230}, crop_pct=0.7),
    "segformer": SegformerImageProcessorPil,
    "segformer, cropped in vain": lambda: SegformerImageProcessorPil(
        size={"height": 96, "width": 64}, do_center_crop=True, crop_size={"height": 32, "width": 32}
    ),
    "efficientnet": EfficientNetImageProcessorPil,
    "efficientnet b0": lambda: EfficientNetImageProcessorPil(
        size={"height": 224, "width": 224},
        resample=0,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.47853944, 0.4732864, 0.47434163],
    ),
    "efficientnet, from −1 to 1": lambda: EfficientNetImageProcessorPil(
        rescale_factor=1 / 127.5, rescale_offset=True, include_top=False
    ),
    "efficientnet, an offset without a scale": lambda: EfficientNetImageProcessorPil(
        do_rescale=False, rescale_offset=True
    ),
    "efficientnet, divided alone": lambda: EfficientNetImageProcessorPil(do_normalize=False, do_center_crop=True),
    "mobilevit, as it is": lambda: MobileViTImageProcessorPil(
        size={"shortest_edge": 288}, do_flip_channel_order=False, do_normalize=True
    ),
    "textnet, cropped alone": lambda: TextNetImageProcessorPil(
        do_resize=False, do_center_crop=True, crop_size={"height": 40, "width": 37}
    ),
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bare") / "net", resnet())


@pytest.mark.parametrize("made", PROCESSORS.values(), ids=PROCESSORS)
def test_a_processor_is_what_transformers_makes_of_its_file(
    made: Callable[[], object], bare: Path, tmp_path: Path
) -> None:
    processor = made()
    processor.save_pretrained(shutil.copytree(bare, tmp_path / "net"))
    assert_prepares_as(prepared(tmp_path / "net"), processor)


# As files on the hub are: keys of older versions, and keys that are left out or null.
FILES: Mapping[str, tuple[type, Mapping[str, object]]] = {
    "deit of 2021": (
        DeiTImageProcessorPil,
        {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224, "do_center_crop": True},
    ),
    "levit of 2022": (LevitImageProcessorPil, {"feature_extractor_type": "LevitFeatureExtractor", "size": 224}),
    "segformer of 2021": (
        SegformerImageProcessorPil,
        {"feature_extractor_type": "SegformerFeatureExtractor", "size": 128, "reduce_labels": True},
    ),
    "poolformer, no share": (PoolFormerImageProcessorPil, {"crop_pct": None, "size": {"shortest_edge": 231}}),
    "clip, no steps": (CLIPImageProcessorPil, {"do_normalize": None, "do_rescale": None, "crop_size": 201}),
    "efficientnet of the fast kind": (
        EfficientNetImageProcessorPil,
        {"image_processor_type": "EfficientNetImageProcessorFast", "do_center_crop": None, "include_top": None},
    ),
}


@pytest.mark.parametrize(("kind", "fields"), FILES.values(), ids=FILES)
def test_a_file_of_another_version_is_read_as_transformers_reads_it(
    kind: type, fields: Mapping[str, object], bare: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(bare, tmp_path / "net")
    named = {"image_processor_type": kind.__name__.removesuffix("Pil")} | dict(fields)
    if "feature_extractor_type" in fields:
        del named["image_processor_type"]
    (folder / "preprocessor_config.json").write_text(json.dumps(named))
    assert_prepares_as(prepared(folder), kind.from_pretrained(folder))


def prepared(folder: Path) -> Model:
    """Return a model with the preprocessing of a folder, and a network that takes no time."""
    means = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4))
    spec = sources.load(f"hf:{folder}").replace(module=means, input=None, output_key=None, class_names=None)
    return Model(spec.completed({}), device=torch.device("cpu"))


def assert_prepares_as(model: Model, processor: object) -> None:
    """Pixel for pixel, for both resize by Pillow; what is left is the rounding of float32."""
    photograph = np.asarray(Image.open(PHOTOGRAPH))
    step = 1 / np.asarray(model.preprocessing.std_in_pixels)[:, None, None]  # what one of 255 pixel values makes
    for height, width in SIZES:
        picture = photograph[40 : 40 + height, 90 : 90 + width] if height < 300 else photograph[:, :width]
        expected = np.stack(processor(Image.fromarray(picture))["pixel_values"])  # [1, C, H, W]
        pixels, geometry = model.preprocessing.fit(picture)
        got = model.inputs(torch.from_numpy(np.ascontiguousarray(pixels))[None]).numpy()
        assert got.shape == expected.shape
        assert (np.abs(got - expected) / step).max() <= 1e-3, (height, width, geometry)
        assert (expected / step).std() > 10  # a picture
