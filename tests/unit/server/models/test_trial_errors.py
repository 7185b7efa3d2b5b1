"""Settings that contradict what a model returns, at load and with its first rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import Saliency
from sidelight_server import Channels, ConfigurationError, Engine, ModelSpec, Score
from sidelight_server.errors import FailedPrecondition
from torch import Tensor, nn

from support.engines import ask
from support.models.outputs import SETTINGS, SIZE, Configured, Net, OneSide, Returning, Sigmoid, Softmaxed


class Aged(Net):
    """A model with another input, which is no label."""

    def forward(self, image: Tensor, age: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(image) * (1 + age[:, None])


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x) * float("nan")


WRONG: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "input": (Net, {"input": "image"}, r'input: the module takes no "image"; it takes x'),
    "arguments": (Net, {"arguments": {"scale": 2}}, r'arguments: the module takes no "scale"; it takes x'),
    "label": (Net, {"label_argument": "disease"}, r'label_argument: the module takes no "disease"; it takes x'),
    "output of a tensor": (
        Net,
        {"output_key": "logits"},
        r"output_key: got \"logits\", but the model returned a tensor, \[2, 4\]",
    ),
    "output": (
        lambda: Returning(lambda y: {"logit": y}),
        {"output_key": "y_prob"},
        r'output_key: got "y_prob", but the model returned dict of logit \[2, 4\]',
    ),
    "output of another shape": (
        lambda: Returning(lambda y: {"logit": y, "loss": y.sum()}),
        {"output_key": "loss"},
        r"returned dict of logit \[2, 4\], loss \[\] for 2 examples, expected \[n, K\]",
    ),
    "features and logits": (
        lambda: Returning(lambda y: (y.repeat(1, 3), y)),
        {},
        r"output_key: the model returned tuple of 0 \[2, 12\], 1 \[2, 4\]; set output_key to the one .* or class_names",
    ),
    "two of that many classes": (
        lambda: Returning(lambda y: (y, 2 * y)),
        {"class_names": ("a", "b", "c", "d")},
        r"output_key: the model returned tuple of 0 \[2, 4\], 1 \[2, 4\]; set output_key",
    ),
    "several outputs": (
        lambda: Returning(lambda y: {"near": y, "far": y}),
        {},
        r"output_key: the model returned dict of near \[2, 4\], far \[2, 4\]; set output_key",
    ),
    "nothing": (lambda: Returning(lambda y: None), {}, "returned NoneType"),
    "probabilities": (
        Net,
        {"output_kind": "probabilities"},
        r'output_kind: got "probabilities", but the model returned \[2, 4\] from',
    ),
    "logits": (Softmaxed, {"output_kind": "logits"}, "its last step is a softmax"),
    "two that are missing": (Configured, {}, "arguments: the module also requires scale, flip"),
    "classes": (lambda: Returning(lambda y: y.argmax(dim=1)), {}, r"cannot be differentiated|returned int64 \[2\]"),
    "an input that is no label": (Aged, {}, 'label_argument: the outputs depend on "age", so zeros would be wrong'),
    "NaN": (Broken, {}, "are not numbers"),
    "no input": (lambda: Returning(lambda y: torch.ones_like(y)), {}, "cannot be differentiated"),
    "labels": (Net, {"class_names": ("a", "b")}, "class_names: got 2, model .* has 4 classes"),
}


@pytest.mark.parametrize(("make", "spec", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings_fail_at_load_and_say_what_the_model_returned(
    make: Callable[[], nn.Module], spec: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Engine([ModelSpec(make(), input_size=SIZE, **spec)], SETTINGS)


def test_a_model_of_any_size_is_detected_with_a_trial_size() -> None:
    module = Returning(lambda y: {"y_prob": y.softmax(dim=1).mean(dim=(2, 3))}, dense=True)
    with Engine([ModelSpec(module, trial_size=(3, 16, 16))], SETTINGS) as engine:
        assert engine.model("").adapter.output == "y_prob"
        answer = ask(engine, torch.randn(2, 3, 5, 9), score=Score.PROBABILITY)
    assert answer.maps.shape == (2, 3, 5, 9)
    assert not answer.failures


# Without a size to try, the first rows show it.

FIRST: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]] = {
    "softmax": (Softmaxed, lambda y: y),
    "sigmoid": (Sigmoid, lambda y: y),
    "one side": (OneSide, lambda p: torch.stack([1 - p, p], dim=1)),
    "dictionary": (lambda: Returning(lambda y: {"logit": y}), lambda y: y["logit"].softmax(dim=1)),
    "logits": (Net, lambda y: y.softmax(dim=1)),
}


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("first", FIRST)
def test_without_a_trial_size_the_first_rows_show_what_the_outputs_are(first: str, n: int) -> None:
    make, read = FIRST[first]
    torch.set_num_threads(1)
    module = make().eval()
    x = torch.randn(n, *SIZE, generator=torch.Generator().manual_seed(1))
    with Engine([ModelSpec(module)], SETTINGS) as engine:
        digest = engine.model("").digest
        answers = [ask(engine, x, score=Score.PROBABILITY, channels=Channels.MAX_ABS) for _ in range(2)]
        assert engine.model("").digest == digest == answers[0].provenance.model_digest
    target = read(module(x)).argmax(dim=1)
    expected = Saliency(lambda x: read(module(x))).attribute(x.clone().requires_grad_(), target).amax(dim=1).detach()
    for answer in answers:
        assert not answer.failures
        # Of a single output the other side is 1 − p by another operation: the last bit of float32.
        np.testing.assert_allclose(
            answer.maps, expected, rtol=0, atol=float(expected.max()) * 1e-6 * (first == "one side")
        )


@pytest.mark.parametrize(
    ("of", "score", "message"),
    [
        (lambda y: (y.tanh() + 1) / 2, Score.PROBABILITY, "set output_kind to"),
        (lambda y: (y.repeat(1, 3), y), Score.PROBABILITY, "set output_key to"),
        (lambda y: y.sigmoid(), Score.LOGIT, "so it has no logit; it has probability, log_probability"),
    ],
    ids=["unknown", "several", "no such score"],
)
def test_an_error_that_the_first_rows_show_is_reported_to_the_caller(
    of: Callable[[Tensor], Any], score: Score, message: str
) -> None:
    with Engine([ModelSpec(Returning(of))], SETTINGS) as engine:
        for _ in range(2):
            try:
                (failure,) = ask(engine, torch.randn(1, *SIZE), score=score).failures
            except FailedPrecondition as error:
                failure = error
            assert failure.code == FailedPrecondition.code
            assert message in failure.message


def test_a_first_input_that_the_module_cannot_take_does_not_affect_later_ones() -> None:
    with Engine([ModelSpec(Softmaxed())], SETTINGS) as engine:
        assert ask(engine, torch.randn(1, 3, 5, 5), score=Score.PROBABILITY).failures
        assert not ask(engine, torch.randn(1, *SIZE), score=Score.PROBABILITY).failures
        assert engine.model("").head.outputs == "probabilities"


def test_dependence_between_rows_is_detected_with_the_first_rows() -> None:
    class Touching(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.logits(x - x.mean(dim=0))

    x = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(1))
    with Engine([ModelSpec(Touching())], SETTINGS) as engine:
        together = ask(engine, x)
        assert engine.model("").chunk_rows == 1
    with Engine([ModelSpec(Touching())], SETTINGS) as engine:
        alone = [ask(engine, each[None]).maps[0] for each in x]
    np.testing.assert_array_equal(together.maps, alone)


def test_trial_size_and_input_size_exclude_each_other() -> None:
    with pytest.raises(ConfigurationError, match="trial_size: is set, and so is input_size"):
        Engine([ModelSpec(Net(), input_size=SIZE, trial_size=SIZE)], SETTINGS)
