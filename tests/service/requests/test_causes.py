"""The message when a model fails: it has what the model returned, and its exception only in one's own process."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from sidelight.pyhealth import BasicGradientSaliencyMaps
from sidelight_server import ModelSpec
from torch import Tensor, nn

IMAGES = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)


class Strange(nn.Module):
    """Does something with the mean of each channel, [n, 3]."""

    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.answer = answer

    def forward(self, x: Tensor) -> object:
        return self.answer(x.mean((2, 3)) * self.weight)


def listening(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the settings of a server that other users can call too."""
    return {"listen": (f"unix:{folder}/other",)}


RETURNED = {
    "two-entries": (lambda y: {"near": y, "far": y}, r"the model returned dict of near \[\d, 3\], far"),
    "text": (lambda _: "nothing", "the model returned str"),
    "none": (lambda _: None, "the model returned NoneType"),
    "three-dimensions": (
        lambda y: y[:, :, None],
        r"the model returned \[\d, 3, 1\] for \d examples",
    ),
    "no-classes": (lambda y: y[:, :0], r"the model returned \[\d, 0\] for \d examples"),
    "complex": (lambda y: y.to(torch.complex64), "complex64"),
}


@pytest.mark.parametrize("is_own", [True, False], ids=["own-process", "other-process"])
@pytest.mark.parametrize(("answer", "pattern"), RETURNED.values(), ids=RETURNED.keys())
def test_outputs_that_cannot_be_understood_are_reported_to_every_caller(
    answer: Callable[[Tensor], object], pattern: str, is_own: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {} if is_own else listening(tmp_path)
    with (
        sidelight_server.serve(Strange(answer), device="cpu", **settings) as address,
        sidelight.connect(address, connect_timeout=10) as client,
        caplog.at_level(logging.ERROR),
        pytest.raises(sidelight.PartialFailure, match=f'model "model": .*{pattern}') as caught,
    ):
        client.attribute(IMAGES)
    failures = caught.value.answer.failures
    assert [each.code for each in failures] == [sidelight.FailedPrecondition.code] * 2
    assert sum("model_failed" in str(record.msg) for record in caplog.records) == 1  # the operator's log has it, too


def test_another_number_of_classes_than_before_is_reported(tmp_path: Path) -> None:
    module = Strange(lambda y: y if float(y.detach().sum()) >= 0 else y[:, :2])
    with (
        sidelight_server.serve(ModelSpec(module, output_kind="logits"), device="cpu", **listening(tmp_path)) as address,
        sidelight.connect(address, connect_timeout=10) as client,
    ):
        client.attribute(np.ones_like(IMAGES))
        with pytest.raises(sidelight.PartialFailure, match="the model returned 2 classes, 3 before"):
            client.attribute(-np.ones_like(IMAGES))


def raising(_: Tensor) -> object:
    raise ZeroDivisionError("the secret of /etc/weights")


def test_what_a_model_raises_is_reported_in_ones_own_process_alone(tmp_path: Path) -> None:
    by_owner = {}
    module = Strange(lambda y: y if float(y.detach().sum()) >= 0 else raising(y))
    for is_own, settings in ((True, {}), (False, listening(tmp_path))):
        with (
            sidelight_server.serve(ModelSpec(module, output_kind="logits"), device="cpu", **settings) as address,
            sidelight.connect(address, connect_timeout=10) as client,
        ):
            client.attribute(np.ones_like(IMAGES))
            by_owner[is_own] = client.attribute(-np.ones_like(IMAGES), on_error="return").failures[0]
    assert {each.code for each in by_owner.values()} == {sidelight.exceptions.Internal.code}
    assert by_owner[True].message == 'model "model" failed on example 0: ZeroDivisionError: the secret of /etc/weights'
    assert by_owner[False].message == 'model "model" failed on example 0; the server\'s log has the cause'


def test_the_drop_in_class_reports_what_a_module_raised_later() -> None:
    state = {"fails": False}

    def fail(y: Tensor) -> object:
        return raising(y) if state["fails"] else {"y_prob": y.softmax(dim=1)}

    with BasicGradientSaliencyMaps(Strange(fail)) as saliency:
        saliency.attribute(image=torch.tensor(IMAGES))
        state["fails"] = True
        with pytest.raises(sidelight.exceptions.Internal, match="ZeroDivisionError: the secret"):
            saliency.attribute(image=torch.tensor(IMAGES))
