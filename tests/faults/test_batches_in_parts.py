"""Batches that are sent in parts: limits, halving, failures and targets."""

import numpy as np
import pytest
import sidelight
import sidelight_server

from support.servers.scripted import answer, failure, scripted
from support.servers.streams import ONE, Requests, Responses, echo, stream
from support.tolerances import NEIGHBORS


def test_a_batch_over_the_servers_limits_is_sent_in_parts_and_answered_whole() -> None:
    sizes = []

    def small(requests: Requests) -> Responses:
        for request in requests:
            sizes.append(request.attribute.images.tensor.shape[0])
            yield answer(request, value=sizes[-1])

    with scripted(small, max_batch_examples=4) as address:
        answers = stream(address, [np.zeros((10, 3, 2, 2), np.float32)], target=list(range(10)))
    assert sizes == [4, 4, 2]
    (whole,) = answers
    assert whole.maps[:, 0, 0].tolist() == [4.0] * 8 + [2.0] * 2
    assert len(whole.predictions) == len(whole.targets) == 10
    assert whole.provenance.target == "per example: " + ", ".join(map(str, range(10)))


def test_a_batch_that_the_server_finds_too_large_is_halved_until_it_is_taken() -> None:
    def narrow(requests: Requests) -> Responses:
        for request in requests:
            n = request.attribute.images.tensor.shape[0]
            yield failure(request, 8) if n > 2 else answer(request, value=n)

    with scripted(narrow) as address:
        (whole,) = stream(address, [np.zeros((7, 3, 2, 2), np.float32)])
        (single,) = stream(address, [ONE])
    assert whole.maps[:, 0, 0].tolist() == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert single.error is None


@pytest.mark.parametrize("limit", ["client", "server"])
def test_large_batches_stream_in_parts_and_give_the_maps_of_smaller_ones(
    spec: sidelight_server.ModelSpec, device: str, limit: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    pixels[7] = 0
    client_limit, server_limit = (50_000, 2**22) if limit == "client" else (2**22, 50_000)
    with (
        sidelight_server.serve(spec, device=device, max_message_bytes=server_limit) as address,
        sidelight.connect(address, connect_timeout=10, max_message_bytes=client_limit) as client,
    ):
        (whole,) = client.stream([pixels], probabilities=True, channels="none", keep_images=True)
        single = [client.attribute(each, probabilities=True, channels="none") for each in pixels[::13]]
    assert whole.maps.shape == (40, 3, 32, 32)
    assert whole.probabilities.shape == (40, 10)
    for each, i in zip(single, range(0, 40, 13), strict=True):
        np.testing.assert_allclose(whole.maps[i], each.maps[0], rtol=0, atol=NEIGHBORS * np.abs(each.maps).max())
        assert whole.predictions[i].index == each.predictions[0].index
    assert whole.picture(7).getextrema() == ((0, 0),) * 3


def test_an_example_that_fails_is_named_by_its_place_in_the_whole_batch(
    spec: sidelight_server.ModelSpec, device: str
) -> None:
    floats = np.zeros((30, 3, 32, 32), np.float32)
    floats[17, 0, 0, 0] = np.nan
    with (
        sidelight_server.serve(spec, device=device) as address,
        sidelight.connect(address, connect_timeout=10, max_message_bytes=100_000) as client,
    ):
        (whole,) = client.stream([floats], on_error="return")
    assert [each.example for each in whole.failures] == [17]
    assert np.isnan(whole.maps[17]).all()
    assert not np.isnan(np.delete(whole.maps, 17, axis=0)).any()


def test_a_target_for_each_example_fits_a_shorter_last_batch() -> None:
    asked: list[list[int]] = []

    def noting(requests: Requests) -> Responses:
        for request in requests:
            asked.append([each.index for each in request.attribute.target.per_example.classes])
            yield answer(request)

    with scripted(noting) as address, sidelight.connect(address) as client:
        list(client.stream([np.concatenate([ONE] * 3), np.concatenate([ONE] * 2)], target=[5, 6, 7]))
    assert sorted(asked) == [[5, 6], [5, 6, 7]]


def test_a_batch_whose_parts_two_models_answered_fails() -> None:
    def changing(requests: Requests) -> Responses:
        for i, request in enumerate(requests):
            yield answer(request, digest=f"model {i}")

    two = np.concatenate([ONE] * 2)
    with scripted(changing, max_batch_examples=1) as address:
        (failed,) = stream(address, [two], allow_model_change=True)
    assert type(failed.error) is sidelight.exceptions.ModelChanged


def test_a_list_of_classes_that_is_longer_than_the_first_batch_is_refused() -> None:
    with scripted(echo) as address:
        first, *_ = stream(address, [ONE, ONE], target=[5, 6, 7])
    assert isinstance(first.error, sidelight.InvalidArgument)
    assert "3 classes for 1 examples" in first.error.message
