"""CUDA graphs. Without a GPU their passes run again instead of a replay; sizes, buffers and neighbors are tested.

`pytest --device cuda tests/unit/server/compute/test_graphs.py` records and replays.
"""

import gc
import weakref

import pytest
import torch
from sidelight_server.compute.kernel import Kernel
from sidelight_server.compute.outputs.head import Head
from sidelight_server.compute.passes.adapter import PLAIN
from sidelight_server.compute.passes.cuda_graphs import MAX_SHAPES, Recording, Recordings, Replay, recorder
from sidelight_server.compute.passes.layers import Layers, Layout
from sidelight_server.config.options import KernelOptions
from sidelight_server.domain import PREDICTED, ResolvedTarget, Score
from sidelight_server.methods.method import Layer, Rectifiers
from torch import Tensor, nn

from support.models import small_cnn
from support.tolerances import NEIGHBORS

# The same sums, with other rows in the chunk: as `docs/explanation/precision.md` says of chunks.


def examples(n: int, *, seed: int = 3) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def recording(module: nn.Module, device: str, **options: object) -> Kernel:
    kernel = Kernel(module, device=torch.device(device), options=KernelOptions(**options))
    kernel.options = kernel.options.model_copy(
        update={"cuda_graphs": True}
    )  # which an operator cannot have without a GPU
    return kernel


def kernels(device: str, **options: object) -> tuple[Kernel, Kernel]:
    plain = Kernel(small_cnn(), device=torch.device(device), options=KernelOptions(**options))
    return recording(small_cnn(), device, **options), plain


def assert_near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=NEIGHBORS * float(b.abs().max()))


@pytest.mark.parametrize("precision", [None, "bfloat16", "float16"])
def test_every_size_gives_what_the_plain_kernel_gives(precision: str | None, device: str) -> None:
    recorded, plain = kernels(device, precision=precision)
    for n in (1, 3, 8, 5, 2, 8):  # larger, then smaller: what an earlier chunk left in the buffers must not matter
        x = examples(n, seed=n).to(device)
        resolved_targets = [PREDICTED, ResolvedTarget(3), ResolvedTarget(2, negative=5)] * n
        scores = [Score.PROBABILITY, Score.LOGIT, Score.LOG_PROBABILITY] * n
        a, b = (each.run(x, resolved_targets[:n], scores[:n]) for each in (recorded, plain))
        assert torch.equal(a.explained, b.explained)
        assert a.gradients.dtype == torch.float32
        for name in ("gradients", "scores", "probabilities"):
            assert_near(getattr(a, name), getattr(b, name))
        looked = recorded.run(x, resolved_targets[:n], scores[:n], gradient=False)
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
    for each in (recorded, plain):
        each.adopt(adapter=PLAIN, head=Head(), layers=Layers({"4": Layout("nchw")}))
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

    recordings = Recordings(lambda x: x.sum(dim=(2, 3)), lambda: counted)
    for n in (5, 8, 6, 7):
        assert recordings.of(examples(n).to(device)) is recordings.of(examples(8).to(device))
    assert recordings.of(examples(4).to(device)) is not recordings.of(examples(8).to(device))
    assert len(n_made) == 2


def sized(n: int, size: int, device: str) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(size)).to(device)


def test_only_the_last_few_shapes_are_kept_and_the_others_leave_nothing(device: str) -> None:
    recordings = Recordings(lambda x: x.sum(dim=(2, 3)), lambda: recorder(torch.device(device)))
    kept: list[weakref.ref[Recording]] = []
    for size in range(8, 8 + 3 * MAX_SHAPES):
        recordings.of(sized(1, 8, device))  # which is asked for again and again, and stays
        kept += [weakref.ref(recordings.of(sized(n, size, device))) for n in (1, 4)]
    gc.collect()
    alive = [ref() is not None for ref in kept]
    n_last = 2 * (MAX_SHAPES - 1)
    assert alive[:2] == [True, True]
    assert alive[2:-n_last] == [False] * (len(kept) - 2 - n_last)
    assert alive[-n_last:] == [True] * n_last


def test_a_shape_that_was_forgotten_gives_the_same_again(device: str) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    recorded, plain = recording(module, device), Kernel(module, device=torch.device(device))
    for size in (*range(8, 9 + MAX_SHAPES), 8):
        x = sized(2, size, device)
        a, b = (each.run(x, [PREDICTED] * 2, [Score.LOGIT] * 2) for each in (recorded, plain))
        assert_near(a.gradients, b.gradients)


def test_shapes_beyond_the_last_few_take_no_more_memory_of_a_gpu(device: str) -> None:
    if torch.device(device).type != "cuda":
        pytest.skip("of a GPU's memory")
    recordings = Recordings(lambda x: x.sin().exp().sum(dim=(2, 3)), lambda: recorder(torch.device(device)))
    reserved = []
    for size in range(256, 256 + 8 * MAX_SHAPES):
        recordings.of(sized(8, size, device))
        gc.collect()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved(torch.device(device)))
    assert reserved[-1] < 1.5 * reserved[MAX_SHAPES]
