"""Targets: the classes to explain, as messages and as text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ..exceptions import InvalidArgument
from .validation import summary, text, whole

Choice = int | str
Region = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class TopK:
    """The `k` most probable classes of each example. Maps get a dimension of k after N, also for k = 1."""

    k: int

    def message(self) -> pb.Target:
        return pb.Target(top_k=pb.TopKTarget(k=whole(self.k, "target.k")))


@dataclass(frozen=True, slots=True)
class Contrast:
    """The score of one class minus the score of another, each by index or label."""

    positive: Choice
    negative: Choice

    def message(self) -> pb.Target:
        positive = choice_message(self.positive, "target.positive")
        return pb.Target(
            contrast=pb.ContrastTarget(positive=positive, negative=choice_message(self.negative, "target.negative"))
        )


@dataclass(frozen=True, slots=True)
class Dense:
    """For a model with a dense output [N, K, h, w]: the sum of a class's scores over a region of the output.

    Without a class, `Dense()` sums the largest score of each pixel. `region` is (top, left, height, width) in pixels of
    the output; None is the whole output.
    """

    label_or_index: Choice | None = None
    region: Region | None = None

    def message(self) -> pb.Target:
        given = self.label_or_index
        choice = None if given is None else choice_message(given, "target.label_or_index")
        return pb.Target(dense=pb.DenseTarget(choice=choice, region=None if self.region is None else _box(self.region)))


Target = Choice | Sequence[Choice] | TopK | Contrast | Dense | None


def target_message(target: Target) -> pb.Target:
    """Convert a target to its message. None is the predicted class; a sequence has one class per example."""
    if to_list := getattr(target, "tolist", None):  # an array or a tensor, of any rank
        target = to_list()
    if target is None:
        return pb.Target(predicted=pb.PredictedTarget())
    if isinstance(target, TopK | Contrast | Dense):
        return target.message()
    if isinstance(target, str):
        return pb.Target(label=text(target, "target"))
    if isinstance(target, int | np.integer):
        return pb.Target(index=whole(target, "target", bits=64))
    if isinstance(target, Sequence):
        classes = [choice_message(each, "target", context=" in the list") for each in target]
        return pb.Target(per_example=pb.PerExampleTarget(classes=classes))
    raise InvalidArgument(
        f"target: got {type(target).__name__}, expected None, a class index, a label or a list of them, TopK, Contrast "
        "or Dense"
    )


def check_one_for_each(target: pb.Target, n_examples: int) -> None:
    """Raise `InvalidArgument` if a list of classes is not as long as its batch."""
    classes = target.per_example.classes
    if target.WhichOneof("target") == "per_example" and len(classes) != n_examples:
        raise InvalidArgument(f"target: {len(classes)} classes for {n_examples} examples, expected one for each")


def target_of_part(target: pb.Target, span: range) -> pb.Target:
    """Return the target for a range of a batch's examples: a list of classes is sliced."""
    if target.WhichOneof("target") != "per_example":
        return target
    classes = target.per_example.classes[span.start : span.stop]
    return pb.Target(per_example=pb.PerExampleTarget(classes=classes))


def target_text(target: pb.Target) -> str:
    match target.WhichOneof("target"):
        case "index":
            return f"index {target.index}"
        case "label":
            return f'label "{target.label}"'
        case "per_example":
            return "per example: " + ", ".join(map(_choice_text, target.per_example.classes))
        case "top_k":
            return f"top {target.top_k.k}"
        case "contrast":
            return f"{_choice_text(target.contrast.positive)} against {_choice_text(target.contrast.negative)}"
        case "dense":
            dense = target.dense
            explained = _choice_text(dense.choice) if dense.HasField("choice") else "of each pixel's largest output"
            return f"dense {explained} over {_region_text(dense)}"
        case other:
            return other or ""


def choice_message(choice: object, field: str, *, context: str = "") -> pb.ClassChoice:
    if isinstance(choice, str):
        return pb.ClassChoice(label=text(choice, field))
    if isinstance(choice, int | np.integer):
        return pb.ClassChoice(index=whole(choice, field, bits=64))
    raise InvalidArgument(f"{field}: got {summary(choice)}{context}, expected class indices or labels")


def _box(region: object) -> tensor_pb2.Box:
    if not isinstance(region, tuple | list) or len(region) != 4:
        raise InvalidArgument(f"target.region: got {summary(region)}, expected (top, left, height, width)")
    top, left, height, width = (whole(each, "target.region") for each in region)
    return tensor_pb2.Box(top=top, left=left, height=height, width=width)


def _choice_text(choice: pb.ClassChoice) -> str:
    return f'"{choice.label}"' if choice.WhichOneof("choice") == "label" else str(choice.index)


def _region_text(dense: pb.DenseTarget) -> str:
    if not dense.HasField("region"):
        return "all of the output"
    box = dense.region
    return f"{box.height} × {box.width} at {box.top}, {box.left}"
