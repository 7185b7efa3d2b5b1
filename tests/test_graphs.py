"""Recorded kernels. Without a GPU their passes simply run again: the ladder, its buffers and its company are tested.

`pytest --device cuda tests/test_graphs.py` records and replays.
"""

from dataclasses import replace

import pytest
import torch
from models import small_cnn
from sidelight_server.attribution import PREDICTED, Aim, Score
from sidelight_server.graphs import Recordings, Replay, recorder
from sidelight_server.kernel import Kernel
from sidelight_server.methods.method import Layer, Rectifiers
from sidelight_server.options import KernelOptions
from torch import Tensor, nn

# The same sums, of rows in other company: as `docs/design.md` says of chunks.
SHARE = 4e-6


def examples(n: int, *, seed: int = 3) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def recording(module: nn.Module, device: str, **options: object) -> Kernel:
    kernel = Kernel(module, device=torch.device(device), options=KernelOptions(**options))
    kernel.options = replace(kernel.options, cuda_graphs=True)  # which an operator cannot have without a GPU
    return kernel


def kernels(device: str, **options: object) -> tuple[Kernel, Kernel]:
    plain = Kernel(small_cnn(), device=torch.device(device), options=KernelOptions(**options))
    return recording(small_cnn(), device, **options), plain


def assert_near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=SHARE * float(b.abs().max()))


@pytest.mark.parametrize("precision", [None, "bfloat16", "float16"])
def test_every_size_gives_what_the_plain_kernel_gives(precision: str | None, device: str) -> None:
    recorded, plain = kernels(device, precision=precision)
    for n in (1, 3, 8, 5, 2, 8):  # larger, then smaller: what an earlier chunk left in the buffers says nothing
        x = examples(n, seed=n).to(device)
        aims = [PREDICTED, Aim(3), Aim(2, negative=5)] * n
        scores = [Score.PROBABILITY, Score.LOGIT, Score.LOG_PROBABILITY] * n
        a, b = (each.run(x, aims[:n], scores[:n]) for each in (recorded, plain))
        assert torch.equal(a.explained, b.explained)
        assert a.gradients.dtype == torch.float32
        for name in ("gradients", "scores", "probabilities"):
            assert_near(getattr(a, name), getattr(b, name))
        looked = recorded.run(x, aims[:n], scores[:n], gradient=False)
        assert looked.gradients is None
        assert_near(looked.probabilities, b.probabilities)


def test_an_answer_outlives_the_next_chunk(device: str) -> None:
    recorded, _ = kernels(device)
    first = recorded.run(examples(2).to(device), [PREDICTED] * 2, [Score.LOGIT] * 2)
    kept = [each.clone() for each in (first.gradients, first.scores, first.probabilities)]
    recorded.run(examples(2, seed=9).to(device), [PREDICTED] * 2, [Score.LOGIT] * 2)
    for was, is_now in zip(kept, (first.gradients, first.scores, first.probabilities), strict=True):
        assert torch.equal(was, is_now)


def test_other_probes_are_not_recorded(device: str) -> None:
    recorded, plain = kernels(device)
    x = examples(2).to(device)
    for probe in (Layer("4"), Rectifiers.GUIDED):
        a, b = (each.run(x, [PREDICTED] * 2, [Score.LOGIT] * 2, probe=probe) for each in (recorded, plain))
        assert_near(a.gradients, b.gradients)


def test_weights_that_were_written_to_are_recorded_anew(device: str) -> None:
    module = small_cnn()
    kernel = recording(module, device, precision="float32")
    x = examples(2).to(device)
    kernel.run(x, [PREDICTED] * 2, [Score.LOGIT] * 2)
    with torch.no_grad():
        module[0].weight.mul_(-1.5)
    again = kernel.run(x, [PREDICTED] * 2, [Score.LOGIT] * 2)
    expected = Kernel(module, device=torch.device(device)).run(x, [PREDICTED] * 2, [Score.LOGIT] * 2)
    assert_near(again.gradients, expected.gradients)


def test_one_recording_serves_all_chunks_up_to_its_size(device: str) -> None:
    n_made = []

    def counted(*passes: Replay) -> tuple[Replay, Replay]:
        n_made.append(passes)
        return recorder(torch.device(device))(*passes)

    recordings = Recordings(lambda x: x.sum(dim=(2, 3)), counted)
    for n in (5, 8, 6, 7):
        assert recordings.of(examples(n).to(device)) is recordings.of(examples(8).to(device))
    assert recordings.of(examples(4).to(device)) is not recordings.of(examples(8).to(device))
    assert len(n_made) == 2
