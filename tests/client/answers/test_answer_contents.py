"""What an answer contains beside its maps, and the types that maps are sent in."""

import math
import sys

import numpy as np
import pytest
import sidelight
import torch
from sidelight.methods.parsing import method_text

from support.tolerances import assert_same

METHODS: dict[str, sidelight.methods.Method] = {
    "gradient": sidelight.Gradient(squared=True),
    "smoothgrad": sidelight.SmoothGrad(samples=4, statistic="variance"),
    "smoothgrad-over-a-path": sidelight.SmoothGrad(samples=2, base=sidelight.IntegratedGradients(steps=3)),
    "smoothgrad-to-a-tolerance": sidelight.SmoothGrad(tolerance=0.4),
    "integrated-gradients": sidelight.IntegratedGradients(steps=4, rule="midpoint", baseline="black"),
    "integrated-gradients-to-a-tolerance": sidelight.IntegratedGradients(tolerance=0.2, baseline="blurred"),
    "integrated-gradients-from-an-array": sidelight.IntegratedGradients(steps=4, baseline=torch.ones(5, 3, 32, 32)),
    "expected-gradients": sidelight.ExpectedGradients(samples=4, baselines=np.ones((2, 3, 32, 32)), noise_level=0.1),
    "grad-cam": sidelight.GradCAM(layer="4", keep_negative=True),
    "layer-gradient-times-activation": sidelight.LayerGradientXActivation(),
    "occlusion": sidelight.Occlusion(window=(8, 16), stride=8, baseline="mean_color"),
    "rise": sidelight.RISE(masks=5, seed=3),
    "guided-backpropagation": sidelight.GuidedBackpropagation(),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_every_method_is_called_and_reported_in_the_provenance_as_it_was_asked(
    client: sidelight.Client, floats: torch.Tensor, method: sidelight.methods.Method
) -> None:
    answer = client.attribute(floats, method=method)
    assert answer.maps.shape == (5, 32, 32)
    assert np.isfinite(answer.maps).all()
    assert np.abs(answer.maps).max() > 0
    asked = method_text(method.message()).replace("layer=''", "layer=6")  # the one that was chosen
    assert answer.provenance.method == asked
    has_many_rows = "rows" in asked or any(name in asked for name in ("expected", "occlusion", "rise"))
    assert [each is not None for each in answer.convergence] == [has_many_rows] * 5
    assert bool(answer.provenance.baseline_digest) == ("tensor" in asked)


def test_a_refined_map_reports_its_error(client: sidelight.Client, floats: torch.Tensor) -> None:
    answer = client.attribute(floats, method=sidelight.IntegratedGradients(tolerance=0.1, max_rows=200))
    assert all(each.error <= 0.1 and 3 <= each.rows <= 200 for each in answer.convergence)
    exact = client.attribute(floats, method=sidelight.IntegratedGradients(steps=300, rule="midpoint"))
    assert all(each.relative_completeness_error < 0.1 for each in exact.convergence)
    assert [each.rows for each in exact.convergence] == [302] * 5


@pytest.mark.parametrize(("map_dtype", "step"), [("float16", 2**-11), ("uint8", 1 / 255 / 2)])
@pytest.mark.parametrize("way", ["attribute", "stream"])
def test_maps_may_travel_in_a_shorter_type(
    client: sidelight.Client, floats: torch.Tensor, map_dtype: str, step: float, way: str
) -> None:
    # Scores of this size have maps within the range of float16.
    whole = client.attribute(floats, score="logit").maps
    if way == "attribute":
        answer = client.attribute(floats, score="logit", map_dtype=map_dtype)
    else:
        (answer,) = client.stream([floats], score="logit", map_dtype=map_dtype)
    assert (answer.maps.dtype, answer.map_dtype) == (np.float32, map_dtype)
    np.testing.assert_allclose(answer.maps, whole, rtol=0, atol=1.01 * step * whole.max())
    assert len(np.unique(answer.maps)) < len(np.unique(whole))


@pytest.mark.parametrize(("map_dtype", "step"), [("float16", 2**-11), ("uint8", 1 / 255 / 2)])
def test_a_weak_example_keeps_its_map_beside_a_strong_one(
    client: sidelight.Client, floats: torch.Tensor, map_dtype: str, step: float
) -> None:
    method = sidelight.Gradient(times_input=True)
    unequal = floats[:2] * torch.tensor([1e3, 1e-3])[:, None, None, None]
    whole = client.attribute(unequal, score="logit", method=method).maps
    assert whole[1].max() < 1e-4 * whole[0].max()
    shorter = client.attribute(unequal, score="logit", method=method, map_dtype=map_dtype).maps
    for exact, map_ in zip(whole, shorter, strict=True):
        np.testing.assert_allclose(map_, exact, rtol=0, atol=1.01 * step * exact.max())


def test_a_failed_example_of_bytes_is_nan_too(client: sidelight.Client, floats: torch.Tensor) -> None:
    broken = floats.clone()
    broken[1] = math.nan
    answer = client.attribute(broken, map_dtype="uint8", on_error="return")
    assert [bool(np.isnan(each).all()) for each in answer.maps] == [False, True, False, False, False]


@pytest.mark.parametrize("ordered", [False, True], ids=["as-ready", "ordered"])
def test_a_stream_yields_maps_as_they_improve(client: sidelight.Client, floats: torch.Tensor, ordered: bool) -> None:
    method = sidelight.SmoothGrad(samples=100)
    batches = [floats, floats[:1], floats[:2]]
    answers = list(client.stream(batches, method=method, partial=True, ordered=ordered))
    assert sorted(answer.index for answer in answers if answer.final) == [0, 1, 2]
    assert not all(answer.final for answer in answers)
    for index, batch in enumerate(batches):
        *improving, last = (answer for answer in answers if answer.index == index)
        assert last.final
        assert not any(answer.final for answer in improving)
        assert_same(last.maps, client.attribute(batch, method=method).maps)
        rows = [each.convergence[0].rows for each in improving if each.convergence[0]]
        assert rows == sorted(rows)
    if ordered:
        assert [answer.index for answer in answers] == sorted(answer.index for answer in answers)


def test_the_geometry_reports_how_a_picture_was_resized_and_cropped(client: sidelight.Client) -> None:
    answer = client.attribute([np.zeros((40, 50, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)])
    assert answer.geometry[0] == sidelight.results.Geometry(
        original_height=40,
        original_width=50,
        scaled_height=32,
        scaled_width=40,
        crop_top=0,
        crop_left=4,
        crop_height=32,
        crop_width=32,
    )
    assert answer.geometry[1] == sidelight.results.Geometry(64, 64, 32, 32, 0, 0, 32, 32)


def test_the_provenance_contains_all_that_a_replay_needs(
    client: sidelight.Client, floats: torch.Tensor, device: str
) -> None:
    method = sidelight.Gradient(signed=True, times_input=True)
    answer = client.attribute(floats, target=["ant", 1, 2, 3, 4], method=method, score="logit", channels="l2")
    facts, model = answer.provenance, client.model()
    assert (facts.model, facts.model_version, facts.model_digest) == ("small", 1, model.digest)
    assert facts.method == "gradient(signed=True, times_input=True, squared=False)"
    assert facts.target == 'per example: "ant", 1, 2, 3, 4'
    assert (facts.score, facts.channels, facts.precision) == ("logit", "l2", "float32")
    assert facts.device.startswith(device)
    assert facts.threads >= 1
    assert facts.chunk_rows == model.chunk_rows
    assert (facts.reproducible, facts.baseline_digest) == (False, "")
    assert facts.software == {
        "sidelight": sidelight.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
    }
    assert (answer.transport, answer.final, answer.index, answer.error) == ("inline", True, 0, None)
    assert answer.convergence == (None,) * 5


@pytest.mark.parametrize(("target", "text"), [(None, "predicted"), (7, "index 7"), ("gnu", 'label "gnu"')])
def test_the_provenance_contains_the_target_as_it_was_requested(
    client: sidelight.Client, floats: torch.Tensor, target: object, text: str
) -> None:
    facts = client.attribute(floats, target=target).provenance
    assert (facts.target, facts.score, facts.channels) == (text, "probability", "max_abs")
    assert facts.method == "gradient(signed=False, times_input=False, squared=False)"


def test_the_parts_of_the_timing_are_within_the_total(client: sidelight.Client, floats: torch.Tensor) -> None:
    timing = client.attribute(floats).timing
    parts = (timing.prepare_s, timing.queue_s, timing.compute_s)
    assert all(part >= 0 for part in parts)
    assert timing.compute_s > 0
    assert sum(parts) <= timing.total_s + 1e-6  # each is rounded to a nanosecond
