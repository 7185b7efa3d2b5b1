"""The drop-in class leaves the caller's objects and threads as they were."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import sidelight
import torch
from sidelight.pyhealth import BasicGradientSaliencyMaps
from torch import Tensor, nn

from support.models import small_cnn
from support.models.classifiers import Make, classifier, gradient, served

N_THREADS = 8


def test_nothing_of_the_callers_is_changed(batch: dict[str, Tensor]) -> None:
    module = classifier("multiclass").train()
    module.logits[0].weight.requires_grad_(False)
    batch["image"].requires_grad_()
    flags = {name: each.requires_grad for name, each in module.named_parameters()}
    state = {name: each.clone() for name, each in module.state_dict().items()}
    before = {key: each.detach().clone() for key, each in batch.items()}
    with BasicGradientSaliencyMaps(module, batch) as saliency:
        maps = saliency.attribute(save_to_batch=True, **batch)["image"]
    assert module.training
    assert flags == {name: each.requires_grad for name, each in module.named_parameters()}
    assert all(each.grad is None for each in (*module.parameters(), batch["image"]))
    assert all(torch.equal(each, state[name]) for name, each in module.state_dict().items())
    assert all(torch.equal(each, before[key]) for key, each in batch.items())
    assert batch["image"].requires_grad
    assert not maps.requires_grad
    for record in saliency.Batch_saliency_maps:
        assert not any(each.requires_grad for each in record.values())


def test_further_training_of_the_module_changes_the_next_map(floats: Tensor) -> None:
    module = classifier("multilabel")
    with BasicGradientSaliencyMaps(module) as saliency:
        saliency.attribute(image=floats)
        module(floats)["y_prob"].square().sum().backward()
        torch.optim.SGD(module.parameters(), lr=0.5).step()
        assert torch.equal(saliency.attribute(2 > 3, 1, image=floats)["image"], gradient(module, floats, [1] * 5))


def test_weights_that_were_replaced_or_converted_are_found_again(floats: Tensor) -> None:
    module = classifier("multilabel")
    with BasicGradientSaliencyMaps(module) as saliency:
        saliency.attribute(image=floats)
        module.logits[-1] = nn.Linear(4 * 30 * 30, 3)
        module.double().float()
        threads = {each for each in threading.enumerate() if each.name == "sidelight-in-process"}
        maps = saliency.attribute(target_class_idx=1, image=floats)["image"]
        assert torch.equal(maps, gradient(module, floats, [1] * 5))
        assert not any(each.is_alive() for each in threads)  # of the engine that was


def test_a_data_set_that_a_module_keeps_is_not_copied(floats: Tensor) -> None:
    class Samples(torch.utils.data.Dataset[Tensor]):
        def __deepcopy__(self, memo: object) -> "Samples":
            raise MemoryError

    module = classifier("binary")
    module.dataset = Samples()
    with BasicGradientSaliencyMaps(module, floats) as saliency:
        assert len(saliency.Batch_saliency_maps) == 1


def test_eight_threads_get_the_serial_maps_to_the_last_bit(floats: Tensor) -> None:
    module = classifier("multiclass").eval()
    batches = [floats.roll(i, dims=0)[: 1 + i % 5] for i in range(16)]
    with BasicGradientSaliencyMaps(module, max_history=1000) as saliency:
        expected = [saliency.attribute(image=each)["image"] for each in batches]

        def call(n: int) -> None:
            maps = saliency.attribute(save_to_batch=True, image=batches[n % 16], disease=n)["image"]
            assert torch.equal(maps, expected[n % 16])

        with ThreadPoolExecutor(N_THREADS) as pool:
            list(pool.map(call, range(160)))
        assert sorted(record["label"] for record in saliency.Batch_saliency_maps) == list(range(160))
        for record in saliency.Batch_saliency_maps:
            assert torch.equal(record["saliency"], expected[record["label"] % 16])


def test_the_drop_in_class_runs_inside_an_event_loop(floats: Tensor) -> None:
    async def cell() -> Tensor:
        with BasicGradientSaliencyMaps(classifier("binary")) as saliency:
            return saliency.attribute(image=floats)["image"]

    assert asyncio.run(cell()).shape == (5, 32, 32)


def test_closing_leaves_no_thread(make: Make, floats: Tensor) -> None:
    with served(small_cnn()):  # what gRPC makes once for a process is there
        before = set(threading.enumerate())
    saliency = make(classifier("binary"), floats)
    ours = {each for each in threading.enumerate() if each.name == "sidelight-in-process"} - before
    saliency.close()
    saliency.close()
    assert not any(each.is_alive() for each in ours)
    assert len(saliency.Batch_saliency_maps) == 1
    if isinstance(saliency.model, nn.Module):
        assert set(threading.enumerate()) <= before
        with pytest.raises(RuntimeError, match="closed"):
            saliency.attribute(image=floats)
    elif isinstance(saliency.model, sidelight.Client):
        assert saliency.attribute(image=floats)["image"].shape == (5, 32, 32)  # it was given, and stays open


def test_closing_leaves_no_thread_of_a_large_batch_either(floats: Tensor) -> None:
    """A large batch is prepared in a thread of its own."""
    before = set(threading.enumerate())
    with BasicGradientSaliencyMaps(classifier("dense"), floats[:2].repeat(1, 1, 20, 20)):
        assert any(each.name.startswith("sidelight-prepare") for each in threading.enumerate())
    assert set(threading.enumerate()) <= before


def test_an_object_that_is_dropped_leaves_no_thread(floats: Tensor) -> None:
    before = set(threading.enumerate())
    saliency = BasicGradientSaliencyMaps(classifier("binary"), floats)
    threads = set(threading.enumerate()) - before
    assert threads
    del saliency
    for each in threads:
        each.join(30)
    assert not any(each.is_alive() for each in threads)
