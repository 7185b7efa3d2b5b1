"""The drop-in class compared with the original: on a module in this process, a client, or a server's address."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sidelight
import torch
from sidelight.pyhealth import BasicGradientSaliencyMaps
from torch import Tensor, nn

from support import ROOT
from support.components import PYHEALTH
from support.models import small_cnn
from support.models.classifiers import Classifier, Make, classifier, gradient, served, softmax


class Keyed(Classifier):
    """A model with other keywords, whose labels are required."""

    def forward(self, scan: Tensor, finding: Tensor) -> dict[str, Tensor]:
        return super().forward(scan) | {"loss": finding.float().mean()}


class AnyKeyword(Classifier):
    """A model that takes any keywords, as PyHealth's own models do."""

    def forward(self, **data: Tensor) -> dict[str, Tensor]:
        return super().forward(data["scan"]) | {"y_true": data["finding"]}


KINDS = ("multiclass", "binary", "multilabel", "dense", "dense, one output", "dense of one pixel")


@pytest.fixture(scope="module")
def original() -> Iterator[Any]:
    """The original class; the stand-ins for the rest of its package are removed again."""
    sys.path.insert(0, str(ROOT))
    before = {name for name in sys.modules if name.startswith("pyhealth")}
    try:
        from benchmarks.support.original import original_class

        yield original_class()
    finally:
        sys.path.remove(str(ROOT))
        for name in [name for name in sys.modules if name.startswith("pyhealth") and name not in before]:
            del sys.modules[name]


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_the_originals_to_the_last_bit(kind: str, n: int, make: Make, original: Any, floats: Tensor) -> None:
    module = classifier(kind).eval()
    expected = original(module).attribute(image=floats[:n])["image"]
    maps = make(module).attribute(image=floats[:n])
    assert list(maps) == ["image"]
    assert expected.any()
    assert torch.equal(maps["image"], expected)


@pytest.mark.parametrize("form", ["dictionary", "list", "tuple", "tensor"])
def test_a_batch_is_explained_at_once(form: str, make: Make, original: Any, batch: dict[str, Tensor]) -> None:
    module = classifier("multiclass").eval()
    given: Any = {
        "dictionary": batch | {"patient_id": ["a"] * 5},
        "list": [*batch.values()],
        "tuple": tuple(batch.values()),
        "tensor": batch["image"],
    }[form]
    saliency = make(module, given)
    (record,) = saliency.get_gradient_saliency_maps()
    assert set(record) == {"saliency", "image", "label"}
    assert torch.equal(record["saliency"], original(module).attribute(image=batch["image"])["image"])
    assert torch.equal(record["image"], batch["image"])
    assert record["image"].data_ptr() != batch["image"].data_ptr()
    assert record["label"] is None if form == "tensor" else torch.equal(record["label"], batch["disease"])
    assert saliency.Input_batch is given
    assert saliency.Batch_saliency_maps == [record]


def test_the_attributes_are_the_originals(make: Make) -> None:
    saliency = make(classifier("binary"), None, "scan", "finding")
    assert saliency.model is saliency.Model
    assert (saliency.Input_batch, saliency.Image_key, saliency.Label_key) == (None, "scan", "finding")
    assert saliency.Batch_saliency_maps == saliency.get_gradient_saliency_maps() == []
    assert repr(saliency) == f"BasicGradientSaliencyMaps(model={type(saliency.model).__name__})"


@pytest.mark.parametrize(
    "given",
    ["pictures", 3, [], {1, 2}, [[1.0]], {"image": [[1.0]]}, torch.zeros(2, 3, 4, 4, dtype=torch.uint8)],
    ids=str,
)
def test_an_invalid_batch_is_refused_before_any_work(given: object) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match=r"^(input_batch|image): got "):
        BasicGradientSaliencyMaps(classifier("binary"), given)
    assert set(threading.enumerate()) <= before


NO_MODELS = {"nothing": None, "a number": 3, "a function": small_cnn, "addresses": ["a:1", "b:2"]}


@pytest.mark.parametrize("model", NO_MODELS.values(), ids=NO_MODELS)
def test_an_invalid_model_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"^model: got "):
        BasicGradientSaliencyMaps(model)


def test_a_batch_without_images_names_the_key(make: Make, floats: Tensor) -> None:
    saliency = make(classifier("binary"))
    with pytest.raises(KeyError, match="image: the batch has no such key; got scan, disease"):
        saliency.attribute(scan=floats, disease=None)


def test_a_batch_of_none_has_no_maps(make: Make, floats: Tensor) -> None:
    saliency = make(classifier("multiclass"), floats[:0])
    assert saliency.Batch_saliency_maps[0]["saliency"].shape == (0, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_maps_are_of_the_images_type(dtype: torch.dtype, make: Make, floats: Tensor) -> None:
    module = classifier("multiclass").eval()
    maps = make(module)(image=floats.to(dtype))["image"]
    assert maps.dtype == dtype
    assert (maps >= 0).all()
    inputs = floats.to(dtype).float()
    assert torch.equal(maps, gradient(module, inputs, module(inputs)["y_prob"].argmax(1).tolist()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_module_of_another_type_gives_the_originals_maps(
    dtype: torch.dtype, make: Make, original: Any, floats: Tensor
) -> None:
    module, images = classifier("multiclass").eval().to(dtype), floats.to(dtype)
    expected = original(module).attribute(image=images)["image"]
    saliency = make(module)
    maps = saliency.attribute(image=images)["image"]
    assert maps.dtype == expected.dtype
    if dtype == torch.float64 and not isinstance(saliency.model, nn.Module):
        maps, expected = maps.float(), expected.float()  # as which maps go over the wire
    assert torch.equal(maps, expected)


@pytest.mark.parametrize("classes", [3, [4, 0, 1, 0, 2], torch.tensor([4, 0, 1, 0, 2])], ids=["one", "each", "tensor"])
def test_a_class_that_is_named_is_explained(classes: Any, make: Make, floats: Tensor) -> None:
    module = classifier("multilabel")
    each = [3] * 5 if isinstance(classes, int) else list(classes)
    maps = make(module).attribute(target_class_idx=classes, image=floats)["image"]
    assert torch.equal(maps, gradient(module, floats, each))


@pytest.mark.parametrize("classes", [5, -1, [0, 1], [0, 1, 2, 3, 9]], ids=str)
def test_a_class_index_out_of_range_is_refused(classes: Any, make: Make, floats: Tensor) -> None:
    with pytest.raises(sidelight.SidelightError, match="class"):
        make(classifier("multilabel")).attribute(target_class_idx=classes, image=floats)


@pytest.mark.parametrize("kind", [Keyed, AnyKeyword])
def test_keys_of_the_callers_reach_the_models_own_keywords(
    kind: type[Classifier], original: Any, floats: Tensor
) -> None:
    module = kind(small_cnn(), softmax).eval()
    expected = original(Classifier(module.logits, softmax)).attribute(image=floats)["image"]
    with BasicGradientSaliencyMaps(module, {"scan": floats}, image_key="scan", label_key="finding") as saliency:
        assert torch.equal(saliency.attribute(scan=floats)["scan"], expected)
        assert torch.equal(saliency.Batch_saliency_maps[0]["saliency"], expected)
        assert saliency.Batch_saliency_maps[0]["label"] is None


def test_the_probabilities_are_explained_where_logits_are_beside_them(floats: Tensor) -> None:
    """They need not be the softmax of what is called logits."""

    class Tempered(Classifier):
        def forward(self, image: Tensor) -> dict[str, Tensor]:
            logits = self.logits(image)
            return {"logit": logits, "y_prob": (logits / 3).softmax(dim=1)}

    module = Tempered(small_cnn()).eval()
    with BasicGradientSaliencyMaps(module) as saliency:
        maps = saliency.attribute(image=floats)["image"]
    assert torch.equal(maps, gradient(module, floats, module(floats)["y_prob"].argmax(dim=1).tolist()))


def test_a_module_that_returns_logits_alone_is_explained_too(floats: Tensor) -> None:
    with BasicGradientSaliencyMaps(small_cnn()) as saliency:
        maps = saliency.attribute(image=floats)["image"]
    module = Classifier(small_cnn(), softmax).eval()
    assert torch.equal(maps, gradient(module, floats, module(floats)["y_prob"].argmax(dim=1).tolist()))


def test_images_may_change_their_size(floats: Tensor) -> None:
    module = classifier("dense").eval()
    with BasicGradientSaliencyMaps(module) as saliency:
        for size in (32, 20, 26):
            images = floats[..., :size]
            with torch.no_grad():
                assert saliency.attribute(image=images)["image"].shape == (5, 32, size)


def test_the_history_is_bounded_and_can_be_cleared(make: Make, floats: Tensor) -> None:
    saliency = make(classifier("binary"), floats, max_history=3)
    for i in range(4):
        saliency.attribute(save_to_batch=True, image=floats[i : i + 1], disease=[i])
    saliency.attribute(image=floats)
    assert [record["label"] for record in saliency.Batch_saliency_maps] == [[1], [2], [3]]
    saliency.clear()
    assert saliency.get_gradient_saliency_maps() == []


def test_a_module_that_cannot_be_explained_is_refused_with_the_reason(floats: Tensor) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="shapes cannot be multiplied"):
        BasicGradientSaliencyMaps(classifier("binary"), floats[..., :20])
    assert set(threading.enumerate()) <= before


def test_an_example_that_fails_is_named(make: Make, floats: Tensor) -> None:
    floats[3, 0, 0, 0] = torch.nan
    with pytest.raises(sidelight.InvalidArgument, match="example 3: images: 1 NaN"):
        make(classifier("binary")).attribute(image=floats)


def test_one_of_several_models_can_be_named(floats: Tensor) -> None:
    with served(classifier("binary")) as address:
        with BasicGradientSaliencyMaps(address, floats, served_model="served") as saliency:
            assert len(saliency.Batch_saliency_maps) == 1
        with pytest.raises(sidelight.NotFound, match="severed"):
            BasicGradientSaliencyMaps(address, floats, served_model="severed")
    with pytest.raises(ValueError, match="served_model"):
        BasicGradientSaliencyMaps(small_cnn(), served_model="served")


def test_a_batch_larger_than_a_message_goes_in_parts(floats: Tensor) -> None:
    module, images = classifier("multiclass").eval(), floats.repeat(4, 1, 1, 1)
    with served(module) as address, sidelight.connect(address, max_message_bytes=100_000) as client:
        maps = BasicGradientSaliencyMaps(client, images).Batch_saliency_maps[0]["saliency"]
    torch.testing.assert_close(maps, gradient(module, images, module(images)["y_prob"].argmax(1).tolist()))


def run(program: str) -> str:
    """Run a program and return the end of its output."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    return done.stderr.strip().rpartition("\n")[2]


def test_the_client_alone_needs_no_torch() -> None:
    assert run("import sys, sidelight; assert not {'torch', 'sidelight_server'} & set(sys.modules)") == ""
    missing = "import sys; sys.modules['torch'] = None; import sidelight.pyhealth"
    assert run(missing) == "ImportError: sidelight.pyhealth needs torch: pip install 'sidelight[server]'"


@pytest.mark.slow
@pytest.mark.requires("pyhealth")
def test_a_model_of_pyhealths_own_gives_the_originals_maps(tmp_path: Path) -> None:
    """Binary, multiclass and multilabel, on a data set of PyHealth's; what it keeps goes into a folder of its own."""
    done = subprocess.run(
        [PYHEALTH / "bin" / "python", Path(__file__).with_name("whole_pyhealth.py")],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("equal to the last bit") == 3
