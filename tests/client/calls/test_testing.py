"""The server for users' own tests: its maps are the gradients that torch computes, and it fails on demand."""

import io
import subprocess
import sys

import numpy as np
import pytest
import sidelight
import sidelight.testing
import torch
from PIL import Image
from sidelight import exceptions
from sidelight.testing import linear

from support import ROOT
from support.tolerances import FLOAT32

LABELS = ["ant", "bee", "cow", "dog"]
IMAGES = np.random.default_rng(0).uniform(size=(3, 2, 9, 7)).astype(np.float32)


def probabilities(images: torch.Tensor, n_classes: int = len(LABELS)) -> torch.Tensor:
    weights = torch.tensor(linear.Linear((), n_classes).weights(*images.shape[2:]))
    return torch.softmax(torch.einsum("nchw,khw->nk", images, weights) / images[0].numel(), dim=1)


def gradients(images: np.ndarray, *targets: int) -> np.ndarray:
    """By torch: of the sum of a class's probabilities, for each example."""
    leaf = torch.tensor(images, dtype=torch.float64, requires_grad=True)
    chosen = probabilities(leaf)[range(len(images)), targets].sum()
    return torch.autograd.grad(chosen, leaf)[0].numpy()


@pytest.fixture
def server():
    with sidelight.testing.serve(labels=LABELS) as server:
        yield server


@pytest.fixture
def client(server: sidelight.testing.TestServer):
    with sidelight.connect(server.address) as client:
        yield client


def test_maps_are_the_gradients_of_the_targets_probability(client: sidelight.Client) -> None:
    expected = gradients(IMAGES, 2, 2, 2)
    signed = client.attribute(IMAGES, target="cow", channels="none")
    np.testing.assert_allclose(signed.maps, expected, rtol=FLOAT32, atol=1e-15)
    np.testing.assert_allclose(
        client.attribute(IMAGES, target=2).maps, np.abs(expected).max(axis=1), rtol=FLOAT32, atol=1e-15
    )
    each = client.attribute(IMAGES, target=[0, 3, 1], channels="none")
    np.testing.assert_allclose(each.maps, gradients(IMAGES, 0, 3, 1), rtol=FLOAT32, atol=1e-15)
    contrast = client.attribute(IMAGES, target=sidelight.Contrast("ant", "dog"), channels="none")
    np.testing.assert_allclose(contrast.maps, gradients(IMAGES, 0, 0, 0) - gradients(IMAGES, 3, 3, 3), atol=1e-9)


def test_predictions_are_those_of_the_model(client: sidelight.Client) -> None:
    expected = probabilities(torch.tensor(IMAGES, dtype=torch.float64)).numpy()
    answer = client.attribute(IMAGES, probabilities=True)
    np.testing.assert_allclose(answer.probabilities, expected, rtol=FLOAT32, atol=1e-15)
    assert [each.index for each in answer.predictions] == expected.argmax(axis=1).tolist()
    assert [each.label for each in answer.predictions] == [LABELS[i] for i in expected.argmax(axis=1)]
    top = client.attribute(IMAGES, target=sidelight.TopK(2))
    assert top.maps.shape == (3, 2, 9, 7)


@pytest.mark.parametrize(("map_dtype", "share"), [("float16", 2**-11), ("uint8", 0.5 / 255)])
def test_maps_in_fewer_bits_are_as_near_as_their_bits_allow(
    client: sidelight.Client, map_dtype: str, share: float
) -> None:
    whole = client.attribute(IMAGES).maps
    less = client.attribute(IMAGES, map_dtype=map_dtype).maps
    assert (np.abs(less - whole).max(axis=(1, 2)) <= 1.01 * share * whole.max(axis=(1, 2))).all()


def test_a_stream_is_answered_in_order(client: sidelight.Client) -> None:
    batches = [IMAGES * share for share in np.linspace(0, 1, 40, dtype=np.float32)]
    for batch, answer in zip(batches, client.stream(batches), strict=True):
        np.testing.assert_array_equal(answer.maps, client.attribute(batch).maps)


def test_files_are_decoded_and_a_broken_one_fails_alone(client: sidelight.Client) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((5, 6, 3), 128, np.uint8)).save(file, "PNG")
    with pytest.raises(exceptions.PartialFailure):
        client.attribute([file.getvalue(), b"no picture"])
    answer = client.attribute([file.getvalue(), b"no picture"], on_error="return")
    assert answer.maps.shape == (2, linear.SIDE, linear.SIDE)
    assert np.isfinite(answer.maps[0]).all()
    assert np.isnan(answer.maps[1]).all()
    assert [failure.example for failure in answer.failures] == [1]


def test_a_test_server_fails_on_demand(server: sidelight.testing.TestServer, client: sidelight.Client) -> None:
    server.fail_next(exceptions.Internal("broken"))
    with pytest.raises(exceptions.Internal, match="broken"):
        client.attribute(IMAGES)
    server.fail_next(exceptions.ResourceExhausted("full", retry_delay_s=0.01), times=2)
    assert len(client.attribute(IMAGES)) == len(IMAGES)  # the client retries as the error says
    server.fail_next(exceptions.Unavailable("later"))
    assert [len(answer) for answer in client.stream([IMAGES, IMAGES])] == [3, 3]
    assert len(server.requests) == 1 + 3 + 3
    assert server.requests[0].images.tensor.shape == list(IMAGES.shape)


def test_unknown_targets_and_models_raise_the_errors_of_a_real_server(client: sidelight.Client) -> None:
    for wrong, kind in [({"target": "elk"}, exceptions.InvalidArgument), ({"target": 4}, exceptions.InvalidArgument),
                        ({"model": "other"}, exceptions.NotFound)]:  # fmt: skip
        with pytest.raises(kind):
            client.attribute(IMAGES, **wrong)
    assert client.model("linear").labels == tuple(LABELS)


def test_closing_a_test_server_leaves_nothing_behind() -> None:
    server = sidelight.testing.serve()
    server.close()
    with pytest.raises(exceptions.Unavailable), sidelight.connect(server.address, connect_timeout=0.2) as client:
        client.info()


def test_the_testing_module_needs_neither_torch_nor_the_server() -> None:
    code = "import sys, sidelight.testing; print({'torch', 'sidelight_server'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_the_examples_of_the_docs_run() -> None:
    page = (ROOT / "docs/how-to/test-your-code.md").read_text()
    blocks = [block.partition("```")[0] for block in page.split("```python\n")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/how-to/test-your-code.md", "exec"), {})
