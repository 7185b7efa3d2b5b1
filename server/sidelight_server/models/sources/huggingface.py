"""`hf:DIR`: an image classification model in a folder written by `save_pretrained` of transformers.

Loading makes no network access and runs no code from the folder: weights are safetensors, or read weights-only.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config.spec import ModelSpec
from ...errors import ConfigurationError
from ...telemetry.logs import Event
from . import hf_preprocessor
from .loading import check_no_weights, source_errors
from .torchvision_import import import_with_torchvision

log = logging.getLogger("sidelight")

FORM = "hf:DIR"
CONFIG = "config.json"
ADAPTER = "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def load(location: str, weights: Path | None) -> ModelSpec:
    """Load the classifier in a folder, with its preprocessing and labels."""
    folder = Path(location)
    check_no_weights("hf:", weights)
    if not folder.is_dir():  # transformers would look it up on the hub
        raise ConfigurationError(
            f"model: {folder} " + ("is a file, expected a folder" if folder.exists() else "does not exist")
        )
    config = _read(folder / CONFIG)
    if config.get("auto_map"):
        raise ConfigurationError(f"model: {folder / CONFIG}: auto_map: requires code from the folder, which never runs")
    if (folder / ADAPTER).exists():
        raise ConfigurationError(f"model: {folder / ADAPTER}: changes a model that is elsewhere; expected a whole one")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ConfigurationError(f"model: {folder}: holds no weights, expected {WEIGHTS[0]}")
    path = folder / hf_preprocessor.FILE
    if path.is_file():
        fields, is_bgr = hf_preprocessor.read(path, _read(path), channels=_channels(config))
    else:
        fields, is_bgr = {"input_size": _size(config)}, False
        message = f"pixels are not normalized; add {hf_preprocessor.FILE}, or set mean and std"
        log.warning(Event("no_preprocessor", folder=folder, message=message))
    labels = _labels(folder, config)
    module = _module(folder)
    if is_bgr:
        _take_rgb(module)
        log.info(Event("channels_flipped", folder=folder, message="the network takes BGR; arrays and maps are RGB"))
    return ModelSpec(
        module=module,
        input="pixel_values",
        output_key="logits",
        output_kind="logits",
        activation="sigmoid" if config.get("problem_type") == "multi_label_classification" else "softmax",
        class_names=labels,
        name=folder.resolve().name,
        **fields,
    )


def _take_rgb(module: nn.Module) -> None:
    """Make a BGR network take RGB, which also makes its gradients RGB.

    It changes the module's class instead of wrapping it: a wrapper would change the names of its layers.
    """
    network = type(module)

    def forward(self: nn.Module, pixel_values: Tensor, **named: object) -> object:
        return network.forward(self, pixel_values.flip(1), **named)

    module.__class__ = type(network.__name__, (network,), {"forward": forward})
    module.register_buffer("takes_rgb", torch.tensor(True))  # so that the digest differs


def files(location: str, weights: Path | None) -> tuple[Path, ...]:
    """Return every file of the folder."""
    folder = Path(location)
    return tuple(sorted(each for each in folder.rglob("*") if each.is_file())) or (folder / CONFIG,)


def _module(folder: Path) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ConfigurationError("hf: needs the extra: pip install 'sidelight[hf]'") from error
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        import_with_torchvision("torchvision")  # transformers imports it too, if it is installed
    with source_errors("model", folder), _quiet():
        module, found = transformers.AutoModelForImageClassification.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            ignore_mismatched_sizes=True,  # reported below, with their names
            output_loading_info=True,
        )
        # transformers would only log a warning and initialize missing weights randomly.
        for name, got, expected in found["mismatched_keys"]:
            raise ValueError(f"its weights have {name} {list(got)}, its {CONFIG} expects {list(expected)}")
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"its weights lack {', '.join(missing[:4])}" + (", …" if len(missing) > 4 else ""))
        assert isinstance(module, nn.Module)  # noqa: S101
        return module.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress transformers' warnings, log and progress bar while loading: real problems are raised as errors."""
    from transformers.utils import logging as theirs

    level, had_bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    # Neither function has type annotations.
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        theirs.set_verbosity(level)
        if had_bar:
            theirs.enable_progress_bar()


def _read(path: Path) -> Mapping[str, Any]:
    with source_errors("model", path):
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, dict):
            raise ValueError(f"holds {type(held).__name__}, expected an object")
    return held


def _channels(config: Mapping[str, Any]) -> int:
    return int(config.get("num_channels", 3))


def _size(config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    match config.get("image_size"):
        case int(length):
            return _channels(config), length, length
        case [int(height), int(width)]:
            return _channels(config), height, width
    return None


def _labels(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    named = config.get("id2label")
    if not named:
        return None
    with source_errors("model", folder / CONFIG):
        by_class = {int(index): str(name) for index, name in named.items()}
        if sorted(by_class) != list(range(len(by_class))):
            raise ValueError(f"id2label: names the classes {sorted(by_class)[:8]}, expected 0 and up without a gap")
    return tuple(by_class[index] for index in range(len(by_class)))
