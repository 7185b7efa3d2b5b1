"""What a server reports about itself and its models."""

import dataclasses

import pytest
import sidelight
import torch
from sidelight.v1 import attribution_pb2 as pb

from support.models import LABELS, N_CLASSES


def test_info_reports_version_limits_methods_and_models(client: sidelight.Client) -> None:
    info = client.info()
    assert info.version == sidelight.__version__
    assert info.limits == sidelight.results.Limits(
        max_message_bytes=64 * 2**20,
        max_image_pixels=50_000_000,
        max_in_flight=256,
        max_in_flight_bytes=2**30,
        max_stream_in_flight=32,
        max_example_rows=10_000,
        max_batch_examples=4096,
        max_stream_age_s=3600.0,
        max_rendered_pixels=2**20,
    )
    assert info.shared_memory is None
    assert set(info.methods) == {field.name for field in pb.Method.DESCRIPTOR.fields}
    (model,) = info.models
    assert (model.name, model.version, model.input_size, model.class_count) == ("small", 1, (3, 32, 32), N_CLASSES)
    assert model.scores == ("probability", "logit", "log_probability", "margin")
    assert model.labels is model.layers is None  # only `model` returns those
    assert not model.reproducible
    (chosen,) = (each for each in model.warmup if each.chosen)
    assert (chosen.configuration, chosen.rows) == ("float32", model.chunk_rows)
    assert all(each.rows_per_second > 0 for each in model.warmup)


@pytest.mark.parametrize("name", [None, "", "small"], ids=repr)
def test_a_model_is_reported_with_its_labels_and_layers(client: sidelight.Client, name: str | None) -> None:
    model = client.model(name)
    assert model.labels == LABELS
    assert model.layers == tuple(map(str, range(7)))  # up to where the features are flattened
    assert dataclasses.replace(model, labels=None, layers=None) == client.info().models[0]


@pytest.mark.parametrize("ask", ["model", "attribute", "stream"])
def test_an_unknown_model_is_not_found_and_a_similar_name_is_suggested(
    client: sidelight.Client, floats: torch.Tensor, ask: str
) -> None:
    calls = {
        "model": lambda: client.model("smal"),
        "attribute": lambda: client.attribute(floats, model="smal"),
        "stream": lambda: list(client.stream([floats], model="smal")),
    }
    with pytest.raises(sidelight.NotFound, match='model: there is no "smal"; did you mean "small"'):
        calls[ask]()
