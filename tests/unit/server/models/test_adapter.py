"""Modules with all kinds of calls and outputs: what the trial finds out, and that their maps equal autograd's."""

import collections
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import Saliency
from sidelight_server import Channels, ConfigurationError, Engine, ModelSpec, Score, Settings
from sidelight_server.errors import FailedPrecondition
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextForImageClassification, ResNetConfig, ResNetForImageClassification

from support.engines import ask

SIZE = (3, 8, 8)
K = 4
SETTINGS = Settings(device="cpu", threads=1)


class Net(nn.Module):
    """Logits, [N, K], or [N, K, 8, 8] of a dense one."""

    def __init__(self, n_classes: int = K, *, dense: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Conv2d(6, n_classes, 1) if dense else nn.Linear(6 * 64, n_classes)
        self.dense = dense

    def logits(self, x: Tensor) -> Tensor:
        features = self.conv(x).relu()
        return self.head(features if self.dense else features.flatten(1))

    def forward(self, x: Tensor) -> Any:
        return self.logits(x)


class Aged(Net):
    """A model with another input, which is no label."""

    def forward(self, image: Tensor, age: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(image) * (1 + age[:, None])


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x) * float("nan")


Point = collections.namedtuple("Point", ["features", "logits"])


class Answer:
    """An object of a class of one's own."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.name = "net"


class Softmaxed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(dim=1)


class LogSoftmaxed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).log_softmax(dim=1)


class Sigmoid(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).sigmoid()


class OneSide(Net):
    """Binary, without the dimension of classes."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).sigmoid().squeeze(-1)


class Keyword(Net):
    def forward(self, *, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(pixel_values)


class Configured(Net):
    def forward(self, x: Tensor, scale: float, *, flip: bool) -> Tensor:  # type: ignore[override]
        return self.logits(-x if flip else x) * scale


class Labelled(Net):
    """A model that computes its loss in every pass, with the loss for its kind of label."""

    def __init__(self, kind: str) -> None:
        super().__init__(1 if kind == "binary" else K)
        self.kind = kind

    def forward(self, image: Tensor, disease: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = self.logits(image)
        if self.kind == "multiclass":
            loss = nn.functional.cross_entropy(logits, disease)
            return {"loss": loss, "y_prob": logits.softmax(dim=1), "y_true": disease}
        loss = nn.functional.binary_cross_entropy_with_logits(logits, disease)
        return {"loss": loss, "y_prob": logits.sigmoid(), "y_true": disease}


class AnyKeyword(Labelled):
    """As PyHealth's models are: its keywords are known by its dataset alone."""

    feature_keys = ["scan"]  # noqa: RUF012
    label_keys = ["finding"]  # noqa: RUF012

    def forward(self, **data: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(data["scan"], data["finding"])


class Returning(Net):
    def __init__(self, of: Callable[[Tensor], Any], n_classes: int = K, *, dense: bool = False) -> None:
        super().__init__(n_classes, dense=dense)
        self.of = of

    def forward(self, x: Tensor) -> Any:
        return self.of(self.logits(x))


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
def test_how_a_module_is_called_and_what_it_returns_is_found_out(
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
def test_a_last_step_is_known_behind_what_changes_only_its_shape(shaped: str) -> None:
    assert found(Returning(lambda y: SHAPED[shaped](y.sigmoid())))[1:] == ("probabilities", "sigmoid")
    if shaped in ("clamp", "where", "in turn"):  # which make anything of logits
        with pytest.raises(ConfigurationError, match="set output_kind"):
            found(Returning(lambda y: SHAPED[shaped](y)))
    else:
        assert found(Returning(lambda y: SHAPED[shaped](y)))[1:] == ("logits", "softmax")


@pytest.mark.parametrize("shaped", [each for each in SHAPED if each != "where"])
def test_a_softmax_is_known_in_the_same_way(shaped: str) -> None:
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
def test_numbers_that_may_be_probabilities_are_refused_until_somebody_says_so(unknown: str) -> None:
    with pytest.raises(ConfigurationError, match=r"output_kind: the model returned \[2, .\] .*set output_kind to"):
        found(Returning(UNKNOWN[unknown]))
    for outputs in ("probabilities", "logits"):
        assert found(Returning(UNKNOWN[unknown]), output_kind=outputs)[1] == outputs


@pytest.mark.parametrize("of", [nn.functional.logsigmoid, lambda y: {"y_prob": 9 * y}], ids=["logarithm", "name"])
def test_what_is_neither_probabilities_nor_logits_is_refused(of: Callable[[Tensor], Any]) -> None:
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
def test_logits_that_lie_in_0_to_1_are_known_by_the_step_that_they_come_of(small: str) -> None:
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


def test_a_transformers_model_needs_no_word() -> None:
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


def test_a_model_of_any_size_is_found_out_on_a_size_to_try() -> None:
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
def test_without_a_size_to_try_the_first_rows_show_what_the_outputs_are(first: str, n: int) -> None:
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
def test_what_the_first_rows_show_to_be_wrong_is_reported_to_the_caller(
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


def test_a_first_input_that_the_module_cannot_take_spoils_nothing() -> None:
    with Engine([ModelSpec(Softmaxed())], SETTINGS) as engine:
        assert ask(engine, torch.randn(1, 3, 5, 5), score=Score.PROBABILITY).failures
        assert not ask(engine, torch.randn(1, *SIZE), score=Score.PROBABILITY).failures
        assert engine.model("").head.outputs == "probabilities"


def test_rows_that_touch_are_known_by_the_first_ones() -> None:
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
