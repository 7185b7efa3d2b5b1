"""Image processor: `preprocessor_config.json`, how a Hugging Face model wants its pictures.

It is read by hand, for its class may want torchvision. What cannot be said by a `ModelSpec` is refused, not approached.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from ...errors import ConfigurationError
from ..preprocessing import Interpolation
from .refusal import refusing

FILE = "preprocessor_config.json"

_WARPED_FROM = 384  # pixels from which ConvNext's processor keeps no aspect, and cuts nothing off
_RANGE_TOLERANCE = 1e-6  # of 255 × rescale_factor: a file says 1/255 in so many digits

_PLAIN: Mapping[str, Any] = {
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
_CONVNEXT = "ConvNextImageProcessor"
# What a class takes where a file is silent. Those that do something of their own to a picture are not here.
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
}
# Said of training, or of what files and arrays are brought to here in any case.
_HARMLESS = ("do_convert_rgb", "do_reduce_labels")


def preprocessing(path: Path, said: Mapping[str, Any], *, channels: int) -> dict[str, Any]:
    """Return what a file says as fields of a `ModelSpec`. `ConfigurationError` names file and key."""
    with refusing("model", path):
        name = _class(said)
        wanted = {**_PLAIN, **_CLASSES[name], **{key: value for key, value in said.items() if value is not None}}
        for key, value in wanted.items():
            if key.startswith("do_") and key not in _PLAIN and key not in _HARMLESS and value:
                raise _refused(key, value, "false")
        for key in ("rescale_offset", "crop_pct"):
            if wanted.get(key) and name != _CONVNEXT:
                raise _refused(key, wanted[key], "none")
        height, width, resize = _geometry(wanted, name)
        return {
            "input_size": (channels, height, width),
            "resize": resize,
            "interpolation": _interpolation(wanted["resample"]),
            "pixel_range": _pixel_range(wanted),
            "mean": _numbers(wanted, "image_mean", channels),
            "std": _numbers(wanted, "image_std", channels),
        }


def _class(said: Mapping[str, Any]) -> str:
    """Return the class by the name that it has without its ways of computing."""
    key = next((each for each in ("image_processor_type", "feature_extractor_type") if said.get(each)), "")
    if not key:
        return "ViTImageProcessor"
    name = str(said[key]).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in _CLASSES:
        raise _refused(key, said[key], f"one of {', '.join(_CLASSES)}")
    return name


def _geometry(wanted: Mapping[str, Any], name: str) -> tuple[int, int, int | str]:
    """Return the input's height and width, and how a picture is resized before its centre is cut out."""
    crop = _square(wanted, "crop_size") if wanted["do_center_crop"] else None
    if not wanted["do_resize"]:
        if crop is None:
            raise _refused("do_resize", False, "true, or a crop: the model takes one size")
        return (*crop, "none")
    size, short = wanted["size"], _short(wanted)
    if short is None:
        height, width = _square(wanted, "size")
        if crop not in (None, (height, width)):
            raise _refused("crop_size", wanted["crop_size"], f"none, or all of size, {height} × {width}")
        return height, width, "exact"
    if name == _CONVNEXT:
        if crop not in (None, (short, short)):
            raise _refused("crop_size", wanted["crop_size"], f"none, for {name} cuts out {short} × {short}")
        return short, short, "exact" if short >= _WARPED_FROM else int(short / wanted["crop_pct"])
    if crop is None:
        raise _refused("size", size, "height and width, or a crop: the model takes one size")
    if max(crop) > short:
        raise _refused("crop_size", wanted["crop_size"], f"{short} at most: what is missing would be filled up")
    return (*crop, short)


def _short(wanted: Mapping[str, Any]) -> int | None:
    """Return the length that the short side gets; None where both sides are given."""
    size = wanted["size"]
    if isinstance(size, Mapping):
        return int(size["shortest_edge"]) if list(size) == ["shortest_edge"] else None
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
    """Return what pixels 0 and 255 become; None: 0 and 1."""
    high = 255 * float(wanted["rescale_factor"]) if wanted["do_rescale"] else 255.0
    return None if abs(high - 1) < _RANGE_TOLERANCE else (0.0, high)


def _numbers(wanted: Mapping[str, Any], key: str, channels: int) -> tuple[float, ...] | None:
    if not wanted["do_normalize"]:
        return None
    value = wanted[key]
    numbers = (float(value),) * channels if isinstance(value, int | float) else tuple(float(each) for each in value)
    if len(numbers) != channels:
        raise _refused(key, value, f"{channels} numbers, for the model takes {channels} channels")
    return numbers


def _refused(key: str, value: object, expected: str) -> ConfigurationError:
    return ConfigurationError(f"{key}: got {value!r}, expected {expected}")
