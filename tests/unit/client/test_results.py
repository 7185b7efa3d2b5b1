"""An answer example by example, as a line of text, as HTML, as a gallery and as a table."""

import html.parser
import io
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import sidelight
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sidelight._inputs.batch import Images
from sidelight._inputs.images import EncodedBatch
from sidelight.results import attribution
from sidelight.results.messages import read_answer
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight.visualization.colormaps import colorize

HOSTILE = "<script>alert('x')</script> & \"q\""
PREDICTED = pb.Target(predicted=pb.PredictedTarget())
TOP_2 = pb.Target(top_k=pb.TopKTarget(k=2))


def example(*classes: int, label: str = "cat", other: str = "dog") -> pb.Example:
    """An example that is predicted as class 1."""
    return pb.Example(
        prediction=pb.Prediction(index=1, label=label, probability=0.97),
        targets=[pb.ExplainedTarget(index=each, label=label if each == 1 else other, score=0.5) for each in classes],
        convergence=pb.Convergence(rows=9, error=0.25),
    )


def answer_of(
    examples: list[pb.Example],
    *,
    target: pb.Target = PREDICTED,
    images: Images | None = None,
    method: pb.Method | None = None,
    **more: object,
) -> sidelight.Attribution:
    n = len(examples)
    shape = (n, 2, 4, 6) if target is TOP_2 else (n, 4, 6)
    maps = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    dtype = tensor_pb2.DATA_TYPE_FLOAT32
    message = pb.Attribution(
        maps=tensor_pb2.Tensor(dtype=dtype, shape=maps.shape, data=maps.tobytes()),
        examples=examples,
        transport=pb.TRANSPORT_INLINE,
        provenance=pb.Provenance(target=target, model="resnet", method=method or pb.Method()),
        **({"final": True} | more),
    )
    if images is None:
        images = np.random.default_rng(1).integers(0, 256, (n, 4, 6, 3), np.uint8)
    return read_answer(message, EncodedBatch(images))


def failing() -> sidelight.Attribution:
    failure = pb.ExampleFailure(example=1, code=3, message=f"no picture: {HOSTILE}")
    return answer_of([example(1), pb.Example(), example(2)], failures=[failure])


@pytest.fixture(params=["plain", "top-k", "failing"])
def answer(request: pytest.FixtureRequest) -> sidelight.Attribution:
    if request.param == "failing":
        return failing()
    return answer_of([example(1, 2)] * 3, target=TOP_2) if request.param == "top-k" else answer_of([example(1)] * 3)


def test_iteration_gives_what_the_tuples_have(answer: sidelight.Attribution) -> None:
    examples = list(answer)
    assert len(examples) == len(answer) == 3
    np.testing.assert_array_equal([each.map for each in examples], answer.maps)
    for field, entries in {
        "prediction": answer.predictions,
        "target": answer.targets,
        "geometry": answer.geometry,
        "convergence": answer.convergence,
        "name": answer.names,
    }.items():
        assert tuple(getattr(each, field) for each in examples) == entries
    assert tuple(each.failure for each in examples if each.failure) == answer.failures
    assert [each.index for each in examples] == [0, 1, 2]


def test_an_example_is_found_by_its_index_from_either_end(answer: sidelight.Attribution) -> None:
    for i in range(3):
        assert answer[i].index == answer[i - 3].index == answer[np.int64(i)].index == i
    for i in (3, -4):
        with pytest.raises(IndexError, match=f"example {i}: the answer has 3"):
            answer[i]
    with pytest.raises(TypeError):
        answer["cat.png"]


def test_an_example_is_drawn_as_the_answer_draws_it() -> None:
    answer = answer_of([example(1, 2)] * 2, target=TOP_2)
    one = answer[1]
    options = {"k": 1, "colormap": "viridis", "alpha": 0.3}
    assert one.overlay(**options).tobytes() == answer.overlay(1, **options).tobytes()
    assert one.picture().tobytes() == answer.picture(1).tobytes()
    np.testing.assert_array_equal(one.heatmap(k=1), answer.maps[1, 1])
    with Image.open(io.BytesIO(one._repr_png_())) as shown:
        assert shown.tobytes() == one.overlay().tobytes()


def test_alpha_is_from_the_picture_to_the_color_map() -> None:
    answer = answer_of([example(1)])
    assert answer.overlay(0, alpha=0).tobytes() == answer.picture(0).tobytes()
    expected = colorize(answer.heatmap(0), colormap="coolwarm")
    assert answer.overlay(0, alpha=1, colormap="coolwarm").tobytes() == expected.tobytes()


def test_a_failed_example_has_its_failure_alone() -> None:
    failed = failing()[1]
    assert failed.prediction is failed.target is failed.convergence is failed._repr_png_() is None
    assert failed.failure.message.startswith("no picture")
    with pytest.raises(sidelight.InvalidArgument, match="no picture"):
        failed.overlay()


def test_without_its_images_an_example_is_shown_as_its_map() -> None:
    answer = pickle.loads(
        pickle.dumps(
            attribution.with_weak_batch(answer_of([example(1)]), EncodedBatch(np.zeros((1, 4, 6, 3), np.uint8)))
        )
    )
    with pytest.raises(sidelight.FailedPrecondition, match="keep_images"):
        answer[0].overlay()
    with Image.open(io.BytesIO(answer[0]._repr_png_())) as shown:
        assert shown.tobytes() == colorize(answer.heatmap(0)).tobytes()
    assert [each["alt"] for each in images_of(answer._repr_html_())] == ["map"]


@given(label=st.text(max_size=300), layer=st.text(max_size=300), n=st.sampled_from([0, 1, 8, 40]), final=st.booleans())
def test_a_repr_is_one_short_line_whatever_the_labels(label: str, layer: str, n: int, final: bool) -> None:
    method = pb.Method(grad_cam=pb.GradCamMethod(layer=layer))
    answer = answer_of([example(2, label=label, other=label)] * n, method=method, final=final)
    for text, limit in ((repr(answer), 300), *((repr(each), 150) for each in answer)):
        assert len(text) < limit
        assert len(text.splitlines()) == 1


def test_a_repr_reports_the_classes_the_method_and_the_model() -> None:
    text = repr(answer_of([example(1)] * 8, method=pb.Method(gradient=pb.GradientMethod())))
    for part in ("8 examples", "maps [8, 4, 6]", "cat 0.97", "gradient(", '"resnet"'):
        assert part in text
    assert repr(answer_of([example(2)])[0]) == "ExampleAttribution(0: cat 0.97 (explained: dog))"
    assert "1 example, " in repr(answer_of([example(2)]))
    assert "1 failed" in repr(failing())
    broken = attribution.failed(sidelight.Unavailable("gone"), index=0)
    assert "gone" in repr(broken)
    assert "gone" in broken._repr_html_()


class Elements(html.parser.HTMLParser):
    """Every element with its attributes, and the text between them."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(text: str) -> Elements:
    elements = Elements()
    elements.feed(text)
    return elements


def images_of(text: str) -> list[dict[str, str | None]]:
    return [attributes for tag, attributes in parsed(text).elements if tag == "img"]


def test_the_html_has_a_picture_a_map_and_an_overlay_of_each_example() -> None:
    answer = answer_of([example(1)] * 3)
    assert [each["alt"] for each in images_of(answer._repr_html_())] == ["picture", "map", "overlay"] * 3
    assert parsed(answer._repr_html_()).text.count("cat 0.97") == 6  # in the line of text, and below each
    many = answer_of([example(1)] * 20)
    assert len(images_of(many._repr_html_())) == 24
    assert "and 12 more" in many._repr_html_()


def test_what_a_label_or_a_message_says_is_text_in_the_html() -> None:
    failure = pb.ExampleFailure(example=1, code=3, message=HOSTILE)
    answer = answer_of([example(1, label=HOSTILE), pb.Example()], failures=[failure])
    shown = parsed(answer._repr_html_())
    assert {tag for tag, _ in shown.elements} == {"div", "figure", "figcaption", "img", "br"}
    assert not any(name.startswith("on") for _, attributes in shown.elements for name in attributes)
    assert "<script>" in shown.text
    assert HOSTILE in shown.text  # the message, whole


def test_a_dictionary_is_what_the_record_stores(answer: sidelight.Attribution, tmp_path: Path) -> None:
    answer.save(tmp_path)
    stored = json.loads((tmp_path / "answer.json").read_bytes())
    as_dict = json.loads(json.dumps(answer.to_dict()))
    for saved, each in zip(stored.pop("examples"), as_dict.pop("examples"), strict=True):
        assert each.items() <= saved.items()
    assert as_dict.items() <= stored.items()
    assert stored.keys() - as_dict.keys() == {"provenance_message"}


def test_a_gallery_has_a_panel_for_each_map() -> None:
    plain, top_2 = answer_of([example(1)] * 2), answer_of([example(1, 2)], target=TOP_2)
    one = sidelight.gallery(plain[0], columns=1).height
    row = sidelight.gallery(plain, columns=1).height - one
    assert row > 0
    assert sidelight.gallery(top_2, columns=1).height == one + row
    assert sidelight.gallery([plain, top_2[0], failing()], columns=1).height == one + 6 * row
    assert sidelight.gallery(iter([plain]), columns=1).tobytes() == sidelight.gallery(plain, columns=1).tobytes()


def test_a_gallery_has_the_texts_and_the_colors_that_are_given() -> None:
    answer = answer_of([example(1)] * 2)
    drawn = sidelight.gallery(answer).tobytes()
    as_before = sidelight.gallery(answer, titles=["cat  0.97"] * 2, subtitles=["example 0", "example 1"])
    assert as_before.tobytes() == drawn
    for options in ({"titles": ["a", "b"]}, {"subtitles": ["a", "b"]}, {"colormap": "magma"}, {"heading": "Why?"}):
        assert sidelight.gallery(answer, **options).tobytes() != drawn


def test_a_gallery_of_named_answers_has_a_row_for_each_picture() -> None:
    two = answer_of([example(1)] * 2)
    one_name, two_names = sidelight.gallery({"gradient": two}), sidelight.gallery({"gradient": two, "mask\nnote": two})
    assert one_name.height == two_names.height
    assert one_name.width < two_names.width
    assert sidelight.gallery({"gradient": [two, two[0]]}).height > one_name.height
    titled = sidelight.gallery({"gradient": two, "mask": two}, titles=["a", "b"], style="mask", theme="light")
    assert titled.tobytes() != two_names.tobytes()
    with pytest.raises(sidelight.InvalidArgument, match="2 by a, 1 by b; expected the same images"):
        sidelight.gallery({"a": two, "b": two[0]})
    with pytest.raises(sidelight.InvalidArgument, match="answers: got no names"):
        sidelight.gallery({})


def test_a_plot_has_a_row_for_each_picture_and_a_column_for_each_name() -> None:
    two = answer_of([example(1)] * 2)
    for style in ("color", "contours", "mask", "map"):
        figure = sidelight.plot({"gradient": two, "mask\nnote": two}, style=style)
        tiles = [axes for axes in figure.axes if axes.images]
        assert len(tiles) == 2 * 3
        assert figure._repr_jpeg_()[:2] == b"\xff\xd8"
    assert len(sidelight.plot(two[0]).axes) == 2
    with pytest.raises(sidelight.InvalidArgument, match="style: got 'lines'"):
        sidelight.plot(two, style="lines")


def test_without_matplotlib_a_plot_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(sidelight.InvalidArgument, match=r"pip install 'sidelight\[plot\]'"):
        sidelight.plot(answer_of([example(1)]))


def test_what_cannot_be_a_gallery_is_refused() -> None:
    answer = answer_of([example(1)] * 2)
    for answers, options, message in (
        ([], {}, "answers: got no examples"),
        (answer, {"titles": ["one"]}, "titles: got 1 for 2 panels"),
        (answer, {"columns": 0}, "columns: got 0"),
        (answer, {"colormap": "jet"}, "colormap: got 'jet', expected one of heat, "),
        (7, {}, "answers: got int"),
        ([answer.maps[0, 0, 0]], {}, "answers: got float32"),
    ):
        with pytest.raises(sidelight.InvalidArgument, match=message):
            sidelight.gallery(answers, **options)
    with pytest.raises(sidelight.Unavailable, match="gone"):
        sidelight.gallery([answer, attribution.failed(sidelight.Unavailable("gone"), index=0)])


def test_without_pandas_a_table_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        answer_of([example(1)]).to_dataframe()


@pytest.mark.requires("pandas")
def test_a_table_has_a_row_for_each_example() -> None:
    frame = failing().to_dataframe()
    assert list(frame.index) == [0, 1, 2]
    assert list(frame["predicted_label"].dropna()) == ["cat", "cat"]
    assert list(frame["target_index"].dropna()) == [1, 2]
    assert list(frame["rows"].dropna()) == [9, 9]
    assert list(frame["failure_code"].dropna()) == [3]
    assert frame["failure_message"][1].startswith("no picture")
    assert frame.drop(columns=["failure_code", "failure_message"]).loc[1].isna().all()


@pytest.mark.requires("pandas")
def test_the_targets_of_a_top_k_table_are_tuples() -> None:
    frame = answer_of([example(1, 2)] * 2, target=TOP_2).to_dataframe()
    assert list(frame["target_index"]) == [(1, 2)] * 2
    assert answer_of([]).to_dataframe().empty
