"""Small networks of transformers, and the folders that it writes of them."""

from pathlib import Path

import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

LABELS = {0: "cat", 1: "dog", 2: "elk", 3: "fox"}


def vit(**config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    settings |= {"image_size": 48, "patch_size": 8, "id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    return ViTForImageClassification(ViTConfig(**settings | config)).eval()


def convnext() -> PreTrainedModel:
    torch.manual_seed(0)
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, num_labels=4)).eval()


def resnet() -> PreTrainedModel:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, num_labels=4)
    return ResNetForImageClassification(config).eval()


def write(folder: Path, module: PreTrainedModel, processor: object = None) -> Path:
    module.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder
