"""Modules with all kinds of calls and outputs: the trial detects both, and the maps equal those of autograd."""

import collections
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import Saliency
from sidelight_server import Channels, ConfigurationError, Engine, ModelSpec, Score
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextForImageClassification, ResNetConfig, ResNetForImageClassification

from support.engines import ask
from support.models.outputs import (
    SETTINGS,
    SIZE,
    AnyKeyword,
    Configured,
    K,
    Keyword,
    Labelled,
    LogSoftmaxed,
    Net,
    OneSide,
    Returning,
    Sigmoid,
    Softmaxed,
)

Point = collections.namedtuple("Point", ["features", "logits"])


class Answer:
    """An object of a class of one's own."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.name = "net"


def found(module: nn.Module, **spec: Any) -> tuple[str, str, str]:
    """What introspection detects of a module: how it is called, what it returns, and the kind of its outputs."""
    with Engine([ModelSpec(module, **{"input_size": SIZE} | spec)], SETTINGS) as engine:
        model = engine.model("")
        return model.adapter.summary, model.head.outputs, model.head.activation


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], tuple[str, str, str]]] = {
    "tensor": (Net, {}, ("(images)", "logits", "softmax")),
    "softmax": (Softmaxed, {}, ("(images)", "probabilities", "softmax")),
    "log-softmax": (LogSoftmaxed, {}, ("(images)", "logits", "softmax")),
    "multilabel probabilities": (Sigmoid, {}, ("(images)", "probabilities", "sigmoid")),
    "multilabel logits": (Net, {"activation": "sigmoid"}, ("(images)", "logits", "sigmoid")),
    "binary [N, 1]": (lambda: Net(1), {}, ("(images)", "logits", "softmax")),
    "binary [N]": (OneSide, {}, ("(images)", "probabilities", "sigmoid")),
    "dense": (lambda: Net(dense=True), {}, ("(images)", "logits", "softmax")),
    "keyword": (Keyword, {}, ("(pixel_values=images)", "logits", "softmax")),
    "named keyword": (Net, {"input": "x"}, ("(x=images)", "logits", "softmax")),
    "arguments": (
        Configured,
        {"arguments": {"scale": 2.0, "flip": True}},
        ("(images, scale=2.0, flip=True)", "logits", "softmax"),
    ),
    "labels": (
        lambda: Labelled("multiclass"),
        {},
        ("(images, disease=zeros) → y_prob", "probabilities", "softmax"),
    ),
    "binary labels": (lambda: Labelled("binary"), {}, ("(images, disease=zeros) → y_prob", "probabilities", "sigmoid")),
    "many labels": (
        lambda: Labelled("multilabel"),
        {},
        ("(images, disease=zeros) → y_prob", "probabilities", "sigmoid"),
    ),
    "any keyword": (
        lambda: AnyKeyword("multiclass"),
        {},
        ("(scan=images, finding=zeros) → y_prob", "probabilities", "softmax"),
    ),
    "any keyword, named": (
        lambda: AnyKeyword("binary"),
        {"input": "scan", "label_argument": "finding", "output_key": "y_prob"},
        ("(scan=images, finding=zeros) → y_prob", "probabilities", "sigmoid"),
    ),
    "dict of logits": (lambda: Returning(lambda y: {"logit": y}), {}, ("(images) → logit", "logits", "softmax")),
    "dict of both": (
        lambda: Returning(lambda y: {"y_prob": y.softmax(dim=1), "logit": y}),
        {},
        ("(images) → logit", "logits", "softmax"),
    ),
    "dict of both, multilabel": (
        lambda: Returning(lambda y: {"y_prob": y.sigmoid(), "logit": y}),
        {},
        ("(images) → logit", "logits", "sigmoid"),
    ),
    "dict of another name": (
        lambda: Returning(lambda y: {"loss": y.sum(), "disease": y}),
        {},
        ("(images) → disease", "logits", "softmax"),
    ),
    "tuple": (lambda: Returning(lambda y: (y, {"auxiliary": y})), {}, ("(images) → 0", "logits", "softmax")),
    "tuple, features before": (
        lambda: Returning(lambda y: (y.repeat(1, 3), y)),
        {"class_names": ("a", "b", "c", "d")},
        ("(images) → 1", "logits", "softmax"),
    ),
    "place": (lambda: Returning(lambda y: [y, 2 * y]), {"output_key": "1"}, ("(images) → 1", "logits", "softmax")),
    "named tuple": (lambda: Returning(lambda y: Point(y.sum(), y)), {}, ("(images) → logits", "logits", "softmax")),
    "object": (lambda: Returning(Answer), {}, ("(images) → logits", "logits", "softmax")),
}


@pytest.mark.parametrize(("make", "spec", "expected"), KINDS.values(), ids=KINDS)
def test_the_trial_detects_how_a_module_is_called_and_what_it_returns(
    make: Callable[[], nn.Module], spec: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    assert found(make(), **spec) == expected


# A sigmoid, and what modules do to it before they return it. It is multilabel, as no row adds up to 1.
SHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda p: p.clamp(1e-6, 1 - 1e-6),
    "where": lambda p: torch.where(p > 0.1, p, torch.zeros_like(p)),
    "stack": lambda p: torch.stack([p, p]).mean(dim=0),
    "mean": lambda p: p.unflatten(1, (K, 1)).mean(dim=2),
    "indexing": lambda p: p[:, [2, 0, 1, 3]],
    "transpose": lambda p: p.T.contiguous().T,
    "times one": lambda p: p * 1.0,
    "over one": lambda p: p / 1,
    "nan_to_num": lambda p: p.nan_to_num(),
    "slices": lambda p: torch.cat([p[:, :2], p[:, 2:]], dim=1),
    "cast": lambda p: p.double().float(),
    "in turn": lambda p: (p[..., None].clamp(0, 1) * 1.0).amax(dim=2).flip(1),
}


@pytest.mark.parametrize("shaped", SHAPED)
def test_the_last_activation_is_detected_behind_operations_that_change_only_the_shape(shaped: str) -> None:
    assert found(Returning(lambda y: SHAPED[shaped](y.sigmoid())))[1:] == ("probabilities", "sigmoid")
    if shaped in ("clamp", "where", "in turn"):  # which make anything of logits
        with pytest.raises(ConfigurationError, match="set output_kind"):
            found(Returning(lambda y: SHAPED[shaped](y)))
    else:
        assert found(Returning(lambda y: SHAPED[shaped](y)))[1:] == ("logits", "softmax")


@pytest.mark.parametrize("shaped", [each for each in SHAPED if each != "where"])
def test_a_softmax_is_detected_in_the_same_way(shaped: str) -> None:
    assert found(Returning(lambda y: SHAPED[shaped](y.softmax(dim=1))))[1:] == ("probabilities", "softmax")


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "a tanh": lambda y: (y.tanh() + 1) / 2,
    "a hard sigmoid": nn.functional.hardsigmoid,
    "the other side": lambda y: 1 - y.sigmoid(),
    "an average": lambda y: (y.sigmoid() + (2 * y).sigmoid()) / 2,
    "half of it": lambda y: y.sigmoid() * 0.5,
    "clamped logits": lambda y: y.clamp(0, 1),
    "classes added up": lambda y: y.sigmoid() @ torch.full((K, 2), 0.2),
    "a gate": lambda y: y.sigmoid() * (y * 2).sigmoid(),
}


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_outputs_that_may_be_probabilities_are_refused_until_a_setting_says_so(unknown: str) -> None:
    with pytest.raises(ConfigurationError, match=r"output_kind: the model returned \[2, .\] .*set output_kind to"):
        found(Returning(UNKNOWN[unknown]))
    for outputs in ("probabilities", "logits"):
        assert found(Returning(UNKNOWN[unknown]), output_kind=outputs)[1] == outputs


@pytest.mark.parametrize("of", [nn.functional.logsigmoid, lambda y: {"y_prob": 9 * y}], ids=["logarithm", "name"])
def test_outputs_that_are_neither_probabilities_nor_logits_are_refused(of: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ConfigurationError, match="neither probabilities nor logits"):
        found(Returning(of))


# What no net of logits may be refused for: here all of them happen to lie in 0 … 1.
SMALL: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda y: y,
    "scaled": lambda y: y * 0.5 / 2,
    "shifted": lambda y: y + 0.01,
    "pooled": lambda y: y[..., None, None].expand(-1, -1, 4, 4).mean(dim=(2, 3)),
    "rectified": torch.relu,
    "two heads": lambda y: (y + 2 * y) / 3,
    "normalized": lambda y: nn.functional.batch_norm(y, torch.zeros(K), torch.ones(K)),
    "a parameter": lambda y: y * torch.full((K,), 0.5),
}


@pytest.mark.parametrize("small", SMALL)
def test_logits_between_0_and_1_are_detected_by_the_operation_that_returns_them(small: str) -> None:
    module = Returning(SMALL[small])
    with torch.no_grad():
        module.head.weight.mul_(0.01)
        module.head.bias.fill_(0.3)
    outputs = module(torch.rand(2, *SIZE))
    assert outputs.min() > 0 and outputs.max() < 1  # noqa: PT018
    assert found(module)[1:] == ("logits", "softmax")


def outputs_of(module: nn.Module, spec: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The probabilities of a module by its own code, [N, K]; of a binary one both sides."""

    def forward(x: Tensor) -> Tensor:
        arguments = dict(spec.get("arguments", {}))
        match module:
            case AnyKeyword():
                returned = module(scan=x, finding=zeros(module, x))
            case Labelled():
                returned = module(x, zeros(module, x))
            case Keyword():
                returned = module(pixel_values=x)
            case _:
                returned = module(x, **arguments)
        return returned

    return forward


def zeros(module: Labelled, x: Tensor) -> Tensor:
    if module.kind == "multiclass":
        return torch.zeros(len(x), dtype=torch.int64)
    return torch.zeros(len(x), module.head.out_features)


PLAIN = {
    "softmax": lambda y: y,
    "multilabel probabilities": lambda y: y,
    "keyword": lambda y: y.softmax(dim=1),
    "arguments": lambda y: y.softmax(dim=1),
    "labels": lambda y: y["y_prob"],
    "many labels": lambda y: y["y_prob"],
    "any keyword": lambda y: y["y_prob"],
    "dict of logits": lambda y: y["logit"].softmax(dim=1),
    "tuple": lambda y: y[0].softmax(dim=1),
    "object": lambda y: y.logits.softmax(dim=1),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_maps_are_captums_of_the_module_called_by_hand(kind: str) -> None:
    torch.set_num_threads(1)  # as the engine has it: shares of several threads end elsewhere, and round otherwise
    make, spec, _ = KINDS[kind]
    module, read = make().eval(), PLAIN[kind]
    call = outputs_of(module, spec)
    x = torch.randn(5, *SIZE, generator=torch.Generator().manual_seed(1))
    with Engine([ModelSpec(module, input_size=SIZE, **spec)], SETTINGS) as engine:
        answer = ask(engine, x, score=Score.PROBABILITY, channels=Channels.MAX_ABS)
    target = read(call(x)).argmax(dim=1)
    expected = Saliency(lambda x: read(call(x))).attribute(x.clone().requires_grad_(), target).amax(dim=1)
    assert [each.predicted for each in answer.explanations] == target.tolist()
    # One chunk for both, so bit-equal.
    np.testing.assert_array_equal(answer.maps, expected.detach().numpy())


@pytest.mark.parametrize("kind", ["binary [N, 1]", "binary [N]", "binary labels"])
def test_a_single_output_explains_the_side_that_is_predicted(kind: str) -> None:
    make, spec, _ = KINDS[kind]
    module = make().eval()
    call = outputs_of(module, spec)

    def probability(x: Tensor) -> Tensor:
        returned = call(x)
        values = returned["y_prob"] if isinstance(returned, dict) else returned
        return (values.sigmoid() if kind == "binary [N, 1]" else values).reshape(len(x))

    x = 3 * torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(1))
    with Engine([ModelSpec(module, input_size=SIZE, **spec)], SETTINGS) as engine:
        answer = ask(engine, x, score=Score.PROBABILITY)
    predicted = (probability(x) >= 0.5).long()
    assert set(predicted.tolist()) == {0, 1}
    leaf = x.clone().requires_grad_()
    sides = torch.where(predicted.bool(), probability(leaf), 1 - probability(leaf))
    (expected,) = torch.autograd.grad(sides.sum(), leaf)
    assert [each.predicted for each in answer.explanations] == predicted.tolist()
    # 1 − p and p by another operation: the last bit of float32.
    np.testing.assert_allclose(answer.maps, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_a_transformers_model_needs_no_settings() -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3, num_channels=3)
    module = ResNetForImageClassification(config)
    assert found(module, input_size=(3, 32, 32)) == ("(images) → logits", "logits", "softmax")


def test_a_transformers_model_that_returns_a_tuple_takes_arguments() -> None:
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, num_labels=3)
    module = ConvNextForImageClassification(config).eval()
    spec = {"input": "pixel_values", "arguments": {"return_dict": False}}
    assert found(module, input_size=(3, 32, 32), **spec) == (
        "(pixel_values=images, return_dict=False) → 0",
        "logits",
        "softmax",
    )


class Static(Net):
    """As an exported program is: it takes no other batch."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != self.batch:
            raise RuntimeError(f"a batch of {len(x)}")
        return self.logits(x)


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("n", [0, 1, 3, 7])
def test_a_static_batch_is_filled_up(batch: int, n: int) -> None:
    x = torch.randn(n, *SIZE, generator=torch.Generator().manual_seed(1))
    with Engine([ModelSpec(Static(batch), input_size=SIZE, batch=(batch, batch))], SETTINGS) as engine:
        answer = ask(engine, x)
    with Engine([ModelSpec(Net(), input_size=SIZE)], SETTINGS) as engine:
        plain = ask(engine, x)
    assert not answer.failures
    # Chunks of other sizes: matrix products add in another order.
    np.testing.assert_allclose(answer.maps, plain.maps, rtol=0, atol=1e-6 * np.abs(plain.maps).max(initial=1e-9))


def test_a_batch_that_is_bounded_bounds_the_chunks() -> None:
    import asyncio

    for batch, expected in (((1, 3), 3), ((5, 5), 5), ((1, 1), 1)):
        with Engine([ModelSpec(Net(), input_size=SIZE, batch=batch)], SETTINGS) as engine:
            asyncio.run(engine.warm_up())
            assert engine.model("").chunk_rows <= batch[1]
            assert engine.model("").chunk_rows == expected


def test_a_module_is_left_as_it_was_by_detection() -> None:
    module = Labelled("multiclass").train()
    flags = [each.requires_grad for each in module.parameters()]
    found(module)
    assert module.training
    assert [each.requires_grad for each in module.parameters()] == flags
    assert all(each.grad is None for each in module.parameters())


def test_a_script_that_can_still_be_trained_is_explained() -> None:
    with warnings.catch_warnings(action="ignore"):  # torch would rather see exports
        script = torch.jit.script(Sigmoid())
    with Engine([ModelSpec(script, input_size=SIZE)], SETTINGS) as engine:
        answer = ask(engine, torch.randn(2, *SIZE), score=Score.PROBABILITY)
    assert not answer.failures
    assert all(each.requires_grad and each.grad is None for each in script.parameters())
