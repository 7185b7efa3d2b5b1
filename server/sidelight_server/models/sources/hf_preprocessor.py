"""Reads `preprocessor_config.json`: the preprocessing of a Hugging Face model.

It is parsed here, because the processor classes may need torchvision. Preprocessing that a `ModelSpec` cannot express
exactly is an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from ...errors import ConfigurationError
from ...inputs.preprocessing import Interpolation
from .loading import source_errors

FILE = "preprocessor_config.json"

_WARPED_FROM = 384  # size from which ConvNext's processor resizes without keeping the aspect ratio or cropping
_ALTERNATIVE = "or, without this file, set input_size, resize, interpolation, pixel_range, mean and std"
_RANGE_TOLERANCE = 1e-6  # tolerance of 255 × rescale_factor: files have 1/255 with a limited number of digits

_DEFAULTS: Mapping[str, Any] = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "default_to_square": True,
    "resample": 2,
    "do_center_crop": False,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": 0.5,
    "image_std": 0.5,
}
_IMAGENET: Mapping[str, Any] = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_CLIP: Mapping[str, Any] = {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": 3,
    "do_center_crop": True,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_MOBILE: Mapping[str, Any] = {"size": {"shortest_edge": 256}, "default_to_square": False, "do_center_crop": True}
_SHORT: Mapping[str, Any] = {"size": {"shortest_edge": 224}, "default_to_square": False, "do_center_crop": True}
_CONVNEXT = "ConvNextImageProcessor"
_EFFICIENTNET = "EfficientNetImageProcessor"
_LEVIT = "LevitImageProcessor"
_MOBILEVIT = "MobileViTImageProcessor"
_POOLFORMER = "PoolFormerImageProcessor"
_SEGFORMER = "SegformerImageProcessor"
_TEXTNET = "TextNetImageProcessor"
# Defaults of each class. Their special processing is in the functions below.
_CLASSES: Mapping[str, Mapping[str, Any]] = {
    "ViTImageProcessor": {},
    "DeiTImageProcessor": {"size": {"height": 256, "width": 256}, "resample": 3, "do_center_crop": True},
    "BeitImageProcessor": {"resample": 3},
    "PvtImageProcessor": {"resample": 3, **_IMAGENET},
    "SiglipImageProcessor": {"resample": 3},
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
    "MobileNetV1ImageProcessor": _MOBILE,
    "MobileNetV2ImageProcessor": _MOBILE,
    _CONVNEXT: {"size": {"shortest_edge": 384}, "default_to_square": False, "resample": 3, "crop_pct": 224 / 256},
    _EFFICIENTNET: {
        "size": {"height": 346, "width": 346},
        "crop_size": {"height": 289, "width": 289},
        "resample": 3,
        "include_top": True,
    },
    _LEVIT: {"resample": 3, **_SHORT, **_IMAGENET},
    _MOBILEVIT: {"resample": 3, **_SHORT, "crop_size": {"height": 256, "width": 256}, "do_flip_channel_order": True},
    _POOLFORMER: {"resample": 3, **_SHORT, **_IMAGENET, "crop_pct": 0.9},
    _SEGFORMER: {"size": {"height": 512, "width": 512}, **_IMAGENET},
    _TEXTNET: {"size": {"shortest_edge": 640}, "default_to_square": False, **_IMAGENET, "size_divisor": 32},
}
# Keys that concern training only, or conversions that are done in any case.
_HARMLESS = ("do_convert_rgb", "do_reduce_labels")
# Keys that change an image, and the classes that support them. For other classes they are an error.
_SUPPORTED: Mapping[str, tuple[str, ...]] = {
    "crop_pct": (_CONVNEXT, _POOLFORMER),
    "rescale_offset": (_EFFICIENTNET,),
    "include_top": (_EFFICIENTNET,),
    "do_flip_channel_order": (_MOBILEVIT,),
}
# Steps that a class ignores even if its file has them.
_IGNORED: Mapping[str, tuple[str, ...]] = {_MOBILEVIT: ("do_normalize",), _SEGFORMER: ("do_center_crop",)}


def read(path: Path, config: Mapping[str, Any], *, channels: int) -> tuple[dict[str, Any], bool]:
    """Interpret a file's content: return fields of a `ModelSpec`, and whether the network takes BGR.

    Raises `ConfigurationError`, which names file and key.
    """
    with source_errors("model", path):
        name = _class(config)
        wanted = {**_DEFAULTS, **_CLASSES[name]}
        wanted |= {key: each for key, each in config.items() if _is_set(key, each, name)}
        wanted |= dict.fromkeys(_IGNORED.get(name, ()), False)
        for key, value in wanted.items():
            is_known = key in _DEFAULTS or key in _HARMLESS or name in _SUPPORTED.get(key, ())
            if value and not is_known and (key.startswith("do_") or key in _SUPPORTED):
                raise _refused(key, value, "false")
        is_bgr = bool(wanted.get("do_flip_channel_order"))
        if is_bgr and channels != 3:
            raise _refused("do_flip_channel_order", True, f"false, for the model takes {channels} channels")
        height, width, resize = _geometry(wanted, name)
        mean, std = _mean_and_std(wanted, channels)
        fields = {
            "input_size": (channels, height, width),
            "resize": resize,
            "odd_margin": "floor",
            "interpolation": _interpolation(wanted["resample"]),
            "pixel_range": _pixel_range(wanted),
            "mean": mean,
            "std": std,
        }
        return fields, is_bgr


def _is_set(key: str, value: object, name: str) -> bool:
    """Return whether a file sets a key: null disables a step, but leaves most other keys at their default."""
    is_step = key.startswith("do_") or key == "include_top" or (key, name) == ("crop_pct", _POOLFORMER)
    return is_step or value is not None


def _class(config: Mapping[str, Any]) -> str:
    """Return the name of the processor class, without suffixes for its implementation."""
    key = next((each for each in ("image_processor_type", "feature_extractor_type") if config.get(each)), "")
    if not key:
        return "ViTImageProcessor"
    name = str(config[key]).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in _CLASSES:
        raise _refused(key, config[key], f"one of {', '.join(_CLASSES)}")
    return name


def _geometry(wanted: Mapping[str, Any], name: str) -> tuple[int, int, int | str]:
    """Return the input's height and width, and how an image is resized before the center crop."""
    crop = _square(wanted, "crop_size") if wanted["do_center_crop"] else None
    if not wanted["do_resize"]:
        if crop is None:
            raise _refused("do_resize", False, "true, or a crop: the model takes one size")
        return (*crop, "none")
    short = _short(wanted)
    if name == _CONVNEXT and short is not None:
        if crop not in (None, (short, short)):
            raise _refused("crop_size", wanted["crop_size"], f"none, for {name} cuts out {short} × {short}")
        return short, short, "exact" if short >= _WARPED_FROM else int(short / wanted["crop_pct"])
    if name == _TEXTNET and wanted["size_divisor"] != 1:
        raise _refused("size_divisor", wanted["size_divisor"], "1: with others the aspect of each picture changes")
    scaled = _scale(wanted, name, short)
    if crop is None:
        if isinstance(scaled, int):
            raise _refused("size", wanted["size"], "height and width, or a crop: the model takes one size")
        return (*scaled, "exact")
    least = (scaled, scaled) if isinstance(scaled, int) else scaled
    if crop[0] > least[0] or crop[1] > least[1]:
        expected = f"{least[0]} × {least[1]} at most, to which images are resized: the rest would be padded"
        raise _refused("crop_size", wanted["crop_size"], expected)
    return (*crop, scaled if isinstance(scaled, int) else "exact" if scaled == crop else "{}x{}".format(*scaled))


def _scale(wanted: Mapping[str, Any], name: str, short: int | None) -> int | tuple[int, int]:
    """Return the size that the class resizes an image to: the length of its short side, or both sides."""
    share = wanted["crop_pct"] if name == _POOLFORMER else None
    if short is not None:
        if name == _LEVIT:
            return int((256 / 224) * short)
        return short if share is None else int(short / share)
    height, width = _square(wanted, "size")
    if share is None:
        return height, width
    return int(height / share) if height == width else (int(height / share), int(width / share))


def _short(wanted: Mapping[str, Any]) -> int | None:
    """Return the new length of the short side; None if both sides are given."""
    size = wanted["size"]
    if isinstance(size, Mapping):
        keys = [key for key, value in size.items() if value is not None]
        return int(size["shortest_edge"]) if keys == ["shortest_edge"] else None
    return int(size) if isinstance(size, int) and not wanted["default_to_square"] else None


def _square(wanted: Mapping[str, Any], key: str) -> tuple[int, int]:
    value = wanted[key]
    match value:
        case int(length):
            return length, length
        case [int(height), int(width)]:
            return height, width
        case {"height": int(height), "width": int(width), **others} if not any(others.values()):
            return height, width
    raise _refused(key, value, "height and width")


def _interpolation(resample: object) -> str:
    known: dict[int, str] = {int(Image.Resampling[each.upper()]): each for each in get_args(Interpolation)}
    if not isinstance(resample, int) or resample not in known:
        raise _refused("resample", resample, f"one of {', '.join(map(str, sorted(known)))}")
    return known[resample]


def _pixel_range(wanted: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the values of pixels 0 and 255; None: 0 and 1."""
    high = 255 * float(wanted["rescale_factor"]) if wanted["do_rescale"] else 255.0
    high = 1.0 if abs(high - 1) < _RANGE_TOLERANCE else high
    low = -1.0 if wanted["do_rescale"] and wanted.get("rescale_offset") else 0.0
    return None if (low, high) == (0, 1) else (low, low + high)


def _mean_and_std(
    wanted: Mapping[str, Any], channels: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    mean = _numbers(wanted, "image_mean", channels) if wanted["do_normalize"] else None
    std = _numbers(wanted, "image_std", channels) if wanted["do_normalize"] else None
    if wanted.get("include_top"):  # EfficientNet's processor divides a second time
        again = _numbers(wanted, "image_std", channels)
        std = again if std is None else tuple(first * second for first, second in zip(std, again, strict=True))
    return mean, std


def _numbers(wanted: Mapping[str, Any], key: str, channels: int) -> tuple[float, ...]:
    value = wanted[key]
    numbers = (float(value),) * channels if isinstance(value, int | float) else tuple(float(each) for each in value)
    if len(numbers) != channels:
        raise _refused(key, value, f"{channels} numbers, for the model takes {channels} channels")
    return numbers


def _refused(key: str, value: object, expected: str) -> ConfigurationError:
    return ConfigurationError(f"{key}: got {value!r}, expected {expected}; {_ALTERNATIVE}")
