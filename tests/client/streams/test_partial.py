"""Answers that are not final: how they are read, and how a stream yields them. The server follows a script."""

import contextlib
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import sidelight
from sidelight._inputs.images import EncodedBatch
from sidelight._streaming.results_queue import End, ResultQueue
from sidelight._streaming.scheduling.parts import Entry
from sidelight.results.messages import read_answer
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from support.servers.scripted import Script, answer, failure, scripted

ONE = np.zeros((1, 3, 2, 2), np.float32)
PREDICTED = pb.Target(predicted=pb.PredictedTarget())


def tensor(values: np.ndarray, *, scale: float = 0.0) -> tensor_pb2.Tensor:
    dtype = tensor_pb2.DataType.Value(f"DATA_TYPE_{values.dtype.name.upper()}")
    scales = [scale] * len(values) if scale else []
    return tensor_pb2.Tensor(dtype=dtype, shape=values.shape, data=values.tobytes(), scales=scales)


def example(*classes: int, **more: object) -> pb.Example:
    explained = [pb.ExplainedTarget(index=each, label=f"class {each}", score=0.5) for each in classes]
    return pb.Example(prediction=pb.Prediction(index=classes[0], probability=0.5), targets=explained, **more)


def result(
    maps: np.ndarray, examples: list[pb.Example], *, target: pb.Target = PREDICTED, scale: float = 0.0, **more: object
) -> pb.Attribution:
    more = {"final": True, "transport": pb.TRANSPORT_INLINE, "provenance": pb.Provenance(target=target)} | more
    return pb.Attribution(maps=tensor(maps, scale=scale), examples=examples, **more)


def read(message: pb.Attribution) -> sidelight.Attribution:
    n = len(message.examples)
    return read_answer(message, EncodedBatch(np.zeros((n, 3, 2, 2), np.float32)))


@pytest.mark.parametrize(
    ("sent", "scale", "expected"),
    [
        (np.array([[[0, 51], [102, 255]]], np.uint8), 0.02, [[[0, 1.02], [2.04, 5.1]]]),
        (np.array([[[0, 0.5], [-2, 65504]]], np.float16), 0.0, [[[0, 0.5], [-2, 65504]]]),
        (np.array([[[0, 0.1], [-2, 3e38]]], np.float32), 0.0, [[[0, 0.1], [-2, 3e38]]]),
    ],
    ids=["uint8", "float16", "float32"],
)
def test_maps_are_float32_however_they_came(sent: np.ndarray, scale: float, expected: list[object]) -> None:
    answer = read(result(sent, [example(1)], scale=scale))
    assert answer.maps.dtype == np.float32
    np.testing.assert_allclose(answer.maps, np.array(expected, np.float32), rtol=1e-6)
    assert answer.map_dtype == sent.dtype.name


def test_a_failed_map_is_nan_even_where_bytes_have_no_nan() -> None:
    failure = pb.ExampleFailure(example=1, code=3, message="no picture")
    sent = np.full((3, 2, 2), 7, np.uint8)
    answer = read(result(sent, [example(1), pb.Example(), example(2)], scale=1.0, failures=[failure]))
    assert np.isnan(answer.maps[1]).all()
    assert (answer.maps[[0, 2]] == 7).all()
    assert answer.predictions[1] is answer.targets[1] is answer.convergence[1] is None


def test_the_explained_classes_of_a_top_k_target_come_in_tuples() -> None:
    maps = np.stack([np.full((3, 2, 2), k, np.float32) for k in (1, -2)], axis=1)  # [3, 2, 2, 2]
    top_2 = pb.Target(top_k=pb.TopKTarget(k=2))
    answer = read(result(maps, [example(4, 5), pb.Example(), example(6, 7)], target=top_2))
    assert answer.is_top_k
    assert [each and tuple(one.index for one in each) for each in answer.targets] == [(4, 5), None, (6, 7)]
    assert [answer.heatmap(0)[0, 0], answer.heatmap(0, k=1)[0, 0], answer.heatmap(2, k=-1)[0, 0]] == [1, -2, -2]
    assert answer.overlay(0, k=1).size == (2, 2)
    assert answer.overlay(0, k=0).tobytes() != answer.overlay(0, k=1).tobytes()
    with pytest.raises(IndexError):
        answer.heatmap(0, k=2)


def test_one_class_of_a_top_k_target_is_a_tuple_too() -> None:
    answer = read(result(np.zeros((1, 1, 2, 2), "f4"), [example(4)], target=pb.Target(top_k=pb.TopKTarget(k=1))))
    assert [one.index for one in answer.targets[0]] == [4]
    assert answer.heatmap(0).shape == (2, 2)


def test_top_k_maps_without_channel_reduction_are_drawn_by_magnitude() -> None:
    maps = np.array([1, -3, 2, 0, 5, -6], np.float32).reshape(1, 2, 3, 1, 1)  # [N, k, C, H, W]
    answer = read(result(maps, [example(4, 5)], target=pb.Target(top_k=pb.TopKTarget(k=2))))
    assert [answer.heatmap(0, k=k).tolist() for k in (0, 1)] == [[[3]], [[6]]]


def test_without_top_k_there_is_one_map_for_each_example() -> None:
    answer = read(result(np.ones((1, 3, 2, 2), np.float32), [example(1)]))
    assert not answer.is_top_k
    assert answer.heatmap(0).tolist() == [[1, 1], [1, 1]]
    with pytest.raises(IndexError, match="k: got 1, but the target is not top-k"):
        answer.heatmap(0, k=1)


def test_convergence_is_reported_as_far_as_the_method_measures_it() -> None:
    examples = [
        example(1, convergence=pb.Convergence(rows=9, error=0.0)),
        example(1, convergence=pb.Convergence(rows=52, completeness_error=0.5, relative_completeness_error=0.25)),
        example(1),
    ]
    answer = read(result(np.zeros((3, 2, 2), np.float32), examples))
    assert answer.convergence == (
        sidelight.results.Convergence(9, 0.0, None, None),
        sidelight.results.Convergence(52, None, 0.5, 0.25),
        None,
    )


def test_a_contrast_reports_its_other_class_even_if_it_is_the_first() -> None:
    contrast = pb.Example(prediction=pb.Prediction(index=2), targets=[pb.ExplainedTarget(index=2, against=0)])
    answer = read(result(np.zeros((2, 2, 2), np.float32), [contrast, example(2)]))
    assert [each.against for each in answer.targets] == [0, None]


def test_the_advice_for_a_saturated_score_names_the_logit() -> None:
    assert 'score="logit"' in sidelight.results.ExplainedTarget(1, "", 1.0, saturated=True).advice
    assert sidelight.results.ExplainedTarget(1, "", 1.0, saturated=False).advice == ""


def test_an_answer_may_have_examples_without_a_map_yet() -> None:
    answer = read(result(np.full((2, 2, 2), np.nan, np.float32), [pb.Example(), example(1)], final=False))
    assert (answer.final, answer.failures) == (False, ())
    assert answer.predictions[0] is answer.targets[0] is None
    assert answer.targets[1].index == 1


def stream(script: Script, n_batches: int, *, ordered: bool, window: int = 10) -> Iterator[sidelight.Attribution]:
    with scripted(script) as address, sidelight.connect(address) as client:
        yield from client.stream([ONE] * n_batches, ordered=ordered, window=window, on_error="return")


def summaries(answers: Iterable[sidelight.Attribution]) -> list[tuple[int, float, bool]]:
    return [(each.index, float(each.maps[0, 0, 0]), each.final) for each in answers]


@pytest.mark.parametrize("ordered", [False, True], ids=["as-ready", "ordered"])
def test_a_batch_is_yielded_as_it_improves_and_never_after_its_final_answer(ordered: bool) -> None:
    taken = threading.Semaphore(0)

    def script(requests: Iterator[pb.AttributeStreamRequest]) -> Iterator[pb.AttributeStreamResponse]:
        request = next(requests)
        for value in (1, 2, 3):
            yield answer(request, value=value, final=False)
            assert taken.acquire(timeout=30)
        yield answer(request, value=4)
        yield answer(request, value=5, final=False)  # no server should
        yield answer(request, value=6)
        assert list(requests) == []

    seen = []
    for each in stream(script, 1, ordered=ordered):
        seen.append(each)
        taken.release()
    assert summaries(seen) == [(0, 1, False), (0, 2, False), (0, 3, False), (0, 4, True)]


def test_in_order_only_the_batch_whose_turn_it_is_is_yielded_before_its_final_answer() -> None:
    taken = threading.Semaphore(0)

    def script(requests: Iterator[pb.AttributeStreamRequest]) -> Iterator[pb.AttributeStreamResponse]:
        asked = [next(requests) for _ in range(3)]
        for place, value, final, is_yielded in (
            (1, 10, False, False),
            (0, 0, False, True),
            (2, 20, True, False),
            (0, 1, True, True),
            (1, 11, False, True),
            (1, 12, True, True),
        ):
            yield answer(asked[place], value=value, final=final)
            assert not is_yielded or taken.acquire(timeout=30)
        assert list(requests) == []

    seen = []
    for each in stream(script, 3, ordered=True):
        seen.append(each)
        taken.release()
    assert summaries(seen) == [(0, 0, False), (0, 1, True), (1, 11, False), (1, 12, True), (2, 20, True)]


def test_an_answer_that_is_not_final_frees_no_room() -> None:
    read_ahead = threading.Event()

    def script(requests: Iterator[pb.AttributeStreamRequest]) -> Iterator[pb.AttributeStreamResponse]:
        asked = [next(requests) for _ in range(2)]
        third = threading.Thread(target=lambda: (asked.append(next(requests)), read_ahead.set()))
        third.start()
        for value in range(5):
            yield answer(asked[0], value=value, final=False)
        assert taken.wait(30)
        assert not read_ahead.wait(0.1)  # time enough for a reader that does not stop
        yield answer(asked[0], value=9)
        assert read_ahead.wait(30)
        third.join()
        yield from map(answer, asked[1:])
        assert list(requests) == []

    taken = threading.Event()
    seen = []
    for each in stream(script, 3, ordered=False, window=1):
        seen.append(each)
        taken.set()
    assert [each.index for each in seen if each.final] == [0, 1, 2]


def test_a_batch_that_fails_after_it_improved_is_yielded_with_its_error() -> None:
    def script(requests: Iterator[pb.AttributeStreamRequest]) -> Iterator[pb.AttributeStreamResponse]:
        request = next(requests)
        yield answer(request, final=False)
        yield failure(request, 4)
        assert list(requests) == []

    *_, last = stream(script, 1, ordered=False)
    assert (last.final, type(last.error)) == (True, sidelight.DeadlineExceeded)


def test_a_slow_caller_gets_the_newest_answer_of_each_batch_in_order_of_their_first_answers() -> None:
    queue, batch = ResultQueue(), EncodedBatch(ONE)
    for index, value in ((0, 1.0), (1, 2.0), (0, 3.0)):
        queue.put(Entry(index, batch, 0.0), read(result(np.full((1, 2, 2), value, np.float32), [example(1)])))
    queue.close(End(KeyError()))
    queue.close(End(None))
    taken = [queue.wait(), queue.take()]
    assert [(sent.index, float(each.maps[0, 0, 0])) for sent, each in taken] == [(0, 3.0), (1, 2.0)]
    assert isinstance(queue.wait().error, KeyError)


def test_an_empty_result_queue_returns_none() -> None:
    assert ResultQueue().take() is None


def test_closing_while_a_batch_improves_ends_the_receiver() -> None:
    def script(requests: Iterator[pb.AttributeStreamRequest]) -> Iterator[pb.AttributeStreamResponse]:
        request = next(requests)
        while not closing.is_set():
            yield answer(request, final=False)

    closing = threading.Event()
    before = set(threading.enumerate())
    with contextlib.closing(stream(script, 1, ordered=True)) as answers:
        assert not next(answers).final
        closing.set()
    assert set(threading.enumerate()) <= before
