"""Pictures of maps, drawn by the server: pixel for pixel those that the client draws."""

import contextlib
import io
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pydicom.data
import pytest
import sidelight
import sidelight_server
import skimage
import sklearn
from PIL import ExifTags, Image
from sidelight._inputs.images import EncodedBatch
from sidelight.results.attribution import Attribution
from sidelight.results.messages import read_answer
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, tensor_pb2
from sidelight.visualization import colormaps
from sidelight_server import Engine, ModelSpec, Request, Settings
from sidelight_server.domain import Files, TopK
from sidelight_server.errors import ResourceExhausted
from sidelight_server.wire import rendering as _rendering
from sidelight_server.wire.rendering import COLORMAPS, Rendering, within

from support.messages.conversation import Conversation
from support.models import small_cnn
from support.servers.running import Running, serving

TIMEOUT_S = 20.0
SIDE = 32
MAX_PIXELS = 1 << 20

SIGNED = pb.Method(gradient=pb.GradientMethod(magnitude=pb.MAGNITUDE_SIGNED))
GRADIENT = pb.Method(gradient=pb.GradientMethod())
PREDICTED = pb.Target(predicted=pb.PredictedTarget())
HEATMAP, ORIGINAL = pb.Rendering.STYLE_HEATMAP, pb.Rendering.SIZE_ORIGINAL


def stored(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photograph(name: str) -> bytes:
    package = sklearn if name.endswith(".jpg") else skimage
    folder = "datasets/images" if name.endswith(".jpg") else "data"
    return (Path(package.__file__).parent / folder / name).read_bytes()


def turned(file: bytes) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return stored(Image.open(io.BytesIO(file)), "JPEG", exif=exif)


def deep() -> bytes:
    """A photograph in gray of 16 bits."""
    gray = np.asarray(Image.open(io.BytesIO(photograph("chelsea.png"))).convert("L")).astype(np.uint16)
    return stored(Image.fromarray(gray * 257 + 3), "PNG")


def translucent() -> bytes:
    picture = Image.open(io.BytesIO(photograph("chelsea.png"))).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return stored(picture, "PNG")


FILES = {
    "JPEG": photograph("china.jpg"),
    "turned by EXIF": turned(photograph("flower.jpg")),
    "PNG": photograph("chelsea.png"),
    "palette": stored(Image.open(io.BytesIO(photograph("flower.jpg"))).quantize(64), "PNG"),
    "translucent": translucent(),
    "16 bits": deep(),
    "smaller than the map": stored(Image.open(io.BytesIO(photograph("china.jpg"))).resize((20, 14)), "PNG"),
}


@pytest.fixture(scope="module")
def channel(device: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[grpc.Channel]:
    with cropping(tmp_path_factory.mktemp("rendering"), device) as server:
        yield server.channel


@contextlib.contextmanager
def cropping(folder: Path, device: str) -> Iterator[Running]:
    """A server of models that crop a picture to [3, 32, 32] and to [1, 32, 32]."""
    specs = [
        ModelSpec(small_cnn(n), name=name, input_size=(n, SIDE, SIDE), resize=40)
        for name, n in (("color", 3), ("gray", 1))
    ]
    with serving(Engine(specs, Settings(device=device)), f"unix:{folder}/socket") as server:
        yield server


def answered(
    channel: grpc.Channel, images: list[bytes] | np.ndarray, rendering: pb.Rendering, **fields: object
) -> tuple[pb.Attribution, Attribution]:
    """Return an answer, and the client's view of it, which draws its pictures itself."""
    batch = EncodedBatch(images)
    output = pb.Output(rendered=rendering, map_dtype=fields.pop("map_dtype", 0))
    request = pb.AttributeRequest(
        **({"images": batch.message, "target": PREDICTED, "method": GRADIENT, "output": output} | fields)
    )
    message = attribution_pb2_grpc.AttributionServiceStub(channel).Attribute(request, timeout=TIMEOUT_S).result
    return message, read_answer(message, batch)


def assert_same_picture(file: bytes, expected: Image.Image) -> None:
    picture = Image.open(io.BytesIO(file))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", expected.size)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


def refusal(channel: grpc.Channel, images: list[bytes] | np.ndarray, rendering: pb.Rendering) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        answered(channel, images, rendering)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value.details()


@pytest.mark.parametrize("model", ["color", "gray"])
@pytest.mark.parametrize("original", [False, True])
def test_pictures_of_files_are_those_of_the_client(model: str, original: bool, channel: grpc.Channel) -> None:
    rendering = pb.Rendering(size=ORIGINAL if original else 0)
    message, answer = answered(channel, list(FILES.values()), rendering, model=model)
    assert not message.failures
    for i, example in enumerate(message.examples):
        (file,) = example.rendered
        assert_same_picture(file, answer.overlay(i, original=original))


def test_a_dicom_files_window_is_that_of_the_model(device: str) -> None:
    file = Path(pydicom.data.get_testdata_file("CT_small.dcm")).read_bytes()
    spec = ModelSpec(small_cnn(1), input_size=(1, SIDE, SIDE), window=(-100.0, 900.0))
    with sidelight_server.serve(spec, device=device) as address, grpc.insecure_channel(address) as channel:
        message, answer = answered(channel, [file], pb.Rendering(size=ORIGINAL))
    assert_same_picture(message.examples[0].rendered[0], answer.overlay(0, original=True))


def test_pictures_of_pixels_are_those_of_the_client(channel: grpc.Channel) -> None:
    photo = np.asarray(Image.open(io.BytesIO(photograph("china.jpg"))).resize((90, 60)))
    for pixels, original in itertools.product((photo, photo[..., :1], photo[:SIDE, :SIDE]), (False, True)):
        message, answer = answered(channel, pixels[None], pb.Rendering(size=ORIGINAL if original else 0))
        assert_same_picture(message.examples[0].rendered[0], answer.overlay(0, original=original))


@pytest.mark.parametrize("size", [pb.Rendering.SIZE_INPUT, pb.Rendering.SIZE_ORIGINAL])
def test_a_floating_array_is_stretched_and_has_one_size(size: pb.Rendering.Size, channel: grpc.Channel) -> None:
    array = np.random.default_rng(0).standard_normal((2, 3, SIDE, SIDE)).astype(np.float32)
    message, answer = answered(channel, array, pb.Rendering(size=size))
    for i in range(2):
        assert_same_picture(message.examples[i].rendered[0], answer.overlay(i))


@pytest.mark.parametrize("colormap", [None, *COLORMAPS])
@pytest.mark.parametrize("alpha", [None, 0.0, 0.4])
def test_colors_opacity_and_percentile_are_those_of_the_client(
    colormap: int | None, alpha: float | None, channel: grpc.Channel
) -> None:
    for size, percentile in ((0, None), (ORIGINAL, 90.0)):
        rendering = pb.Rendering(colormap=colormap, alpha=alpha, percentile=percentile, size=size)
        message, answer = answered(channel, [FILES["JPEG"]], rendering, method=SIGNED)
        expected = answer.overlay(
            0,
            colormap=COLORMAPS.get(colormap),
            alpha=alpha,
            percentile=percentile or colormaps.HIGH_PERCENTILE,
            original=size == ORIGINAL,
        )
        assert_same_picture(message.examples[0].rendered[0], expected)


def test_every_colormap_of_the_client_has_a_number() -> None:
    assert tuple(COLORMAPS.values()) == colormaps.NAMES


@pytest.mark.parametrize("channels", [pb.CHANNEL_REDUCTION_MAX_ABS, pb.CHANNEL_REDUCTION_NONE])
def test_top_k_gives_a_picture_for_each_class(channels: pb.ChannelReduction, channel: grpc.Channel) -> None:
    target = pb.Target(top_k=pb.TopKTarget(k=3))
    message, answer = answered(channel, [FILES["PNG"]] * 2, pb.Rendering(), target=target, channels=channels)
    for i, example in enumerate(message.examples):
        assert len({bytes(file) for file in example.rendered}) == 3
        for k, file in enumerate(example.rendered):
            assert_same_picture(file, answer.overlay(i, k=k))


def test_a_heat_map_is_the_map_alone(channel: grpc.Channel) -> None:
    message, answer = answered(channel, [FILES["JPEG"]], pb.Rendering(style=HEATMAP), method=SIGNED)
    assert_same_picture(message.examples[0].rendered[0], colormaps.colorize(answer.heatmap(0)))
    message, answer = answered(channel, [FILES["JPEG"]], pb.Rendering(style=HEATMAP, size=ORIGINAL), method=SIGNED)
    picture = np.asarray(Image.open(io.BytesIO(message.examples[0].rendered[0])))
    inside = np.asarray(answer.overlay(0, alpha=1.0, original=True))
    photo = np.asarray(Image.open(io.BytesIO(FILES["JPEG"])))
    shown = (inside != photo).any(axis=-1)
    np.testing.assert_array_equal(picture[shown], inside[shown])
    assert not picture[:, :50].any()  # cropped away: 427 × 640 pixels were scaled to 40 × 59


def test_the_type_of_the_maps_does_not_change_their_picture(channel: grpc.Channel) -> None:
    array = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)
    first, *others = (
        answered(channel, array, pb.Rendering(), map_dtype=dtype)[0].examples[0].rendered[0]
        for dtype in (tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_FLOAT16, tensor_pb2.DATA_TYPE_UINT8)
    )
    assert others == [first, first]


def test_a_failed_example_has_no_picture(channel: grpc.Channel) -> None:
    message, _ = answered(channel, [FILES["PNG"], b"no image", FILES["JPEG"]], pb.Rendering())
    assert [len(example.rendered) for example in message.examples] == [1, 0, 1]
    assert [failure.example for failure in message.failures] == [1]


def test_pictures_are_drawn_only_on_request(channel: grpc.Channel) -> None:
    batch = EncodedBatch([FILES["PNG"]])
    request = pb.AttributeRequest(images=batch.message, target=PREDICTED, method=GRADIENT)
    answer = attribution_pb2_grpc.AttributionServiceStub(channel).Attribute(request, timeout=TIMEOUT_S).result
    assert not answer.examples[0].rendered
    assert not answer.timing.HasField("rendering")


def test_an_empty_batch_has_no_pictures(channel: grpc.Channel) -> None:
    message, _ = answered(channel, np.empty((0, SIDE, SIDE, 3), np.uint8), pb.Rendering())
    assert not message.examples


def test_a_stream_sends_pictures_with_final_maps_only(channel: grpc.Channel) -> None:
    method = pb.Method(smoothgrad=pb.SmoothGradMethod(samples=64, noise_level=0.1))
    batch = EncodedBatch([FILES["JPEG"]])
    output = pb.Output(rendered=pb.Rendering(), partial=True)
    request = pb.AttributeRequest(id="a", images=batch.message, target=PREDICTED, method=method, output=output)
    with Conversation(channel) as stream:
        stream.send(pb.AttributeStreamRequest(attribute=request))
        *partial, final = (each.result for each in stream.finish())
    assert final.final
    assert not any(example.rendered for each in partial for example in each.examples)
    assert_same_picture(final.examples[0].rendered[0], read_answer(final, batch).overlay(0))


BAD = {
    "style": pb.Rendering(style=9),
    "size": pb.Rendering(size=9),
    "colormap": pb.Rendering(colormap=99),
    "alpha": pb.Rendering(alpha=1.5),
    "alpha ": pb.Rendering(alpha=float("nan")),
    "alpha of": pb.Rendering(style=HEATMAP, alpha=0.5),
    "percentile": pb.Rendering(percentile=0),
    "percentile ": pb.Rendering(percentile=float("nan")),
    "percentile of": pb.Rendering(percentile=101),
}


@pytest.mark.parametrize("field", BAD)
def test_a_bad_value_is_refused_by_its_name(field: str, channel: grpc.Channel) -> None:
    assert refusal(channel, [FILES["PNG"]], BAD[field]).startswith(f"output.rendered.{field.split()[0]}: ")


def test_maps_above_the_limit_are_refused_and_larger_originals_are_drawn_smaller(tmp_path: Path, device: str) -> None:
    photo = Image.open(io.BytesIO(FILES["JPEG"]))  # 640 × 427
    limit = 320 * 214
    spec = ModelSpec(small_cnn(), input_size=(3, SIDE, SIDE), resize=40)
    with sidelight_server.serve(spec, device=device, max_rendered_pixels=limit) as address:
        with grpc.insecure_channel(address) as channel:
            message, _ = answered(channel, [FILES["JPEG"]], pb.Rendering(size=ORIGINAL))
        with sidelight.connect(address) as client:
            assert client.info().limits.max_rendered_pixels == limit
    picture = Image.open(io.BytesIO(message.examples[0].rendered[0]))
    assert picture.width * picture.height <= limit
    assert abs(picture.width / picture.height - photo.width / photo.height) < 0.01
    smaller = stored(photo.resize(picture.size, Image.Resampling.BILINEAR), "PNG")
    expected = read_answer(message, EncodedBatch([smaller])).overlay(0, original=True)
    assert_same_picture(message.examples[0].rendered[0], expected)

    with (
        sidelight_server.serve(spec, device=device, max_rendered_pixels=SIDE * SIDE - 1) as address,
        grpc.insecure_channel(address) as channel,
    ):
        why = refusal(channel, [FILES["JPEG"]], pb.Rendering())
    assert "32 × 32 are 1,024 pixels, max_rendered_pixels is 1,023" in why


@pytest.mark.parametrize("size", [(640, 427), (1, 60_000), (60_000, 1), (7, 5), (4000, 4000)])
@pytest.mark.parametrize("limit", [1, 10, 1000, 10**6])
def test_a_smaller_size_keeps_the_shape(size: tuple[int, int], limit: int) -> None:
    width, height = within(size, limit)
    assert 1 <= width * height <= max(limit, 1)
    assert width <= size[0]
    assert height <= size[1]
    if size[0] * size[1] <= limit:
        assert (width, height) == size
    elif min(width, height) > 1:
        assert abs(width / size[0] - height / size[1]) <= 1 / min(size)


def test_pictures_are_counted_in_the_permit(tmp_path: Path, device: str) -> None:
    """A server with room for the maps alone refuses the pictures before it computes anything."""
    with cropping(tmp_path, device) as server:
        model = server.engine.models["color"]
        files = Request(Files((FILES["JPEG"],) * 2))
        small = Rendering().held_bytes(files, model, max_pixels=MAX_PIXELS)
        large = Rendering(is_original=True).held_bytes(files, model, max_pixels=MAX_PIXELS)
        three = Request(files.images, target=TopK(3))
        assert large > small > 2 * SIDE * SIDE * 3
        assert large > 2 * MAX_PIXELS * 3
        for original in (False, True):
            one, more = (
                Rendering(is_original=original).held_bytes(each, model, max_pixels=MAX_PIXELS)
                for each in (files, three)
            )
            assert more - one >= 4 * (MAX_PIXELS if original else SIDE * SIDE) * 3
        held: list[int] = []
        draw = server.engine.draw

        async def watched(*drawing: object) -> object:
            held.append(server.server.handler.admission.n_bytes)
            return await draw(*drawing)

        server.engine.draw = watched
        answered(server.channel, [FILES["JPEG"]] * 2, pb.Rendering(size=ORIGINAL))
        assert min(held) > large
        server.until_all_permits_are_back()


def test_an_image_that_is_not_decoded_twice_fails_alone(tmp_path: Path, device: str) -> None:
    with cropping(tmp_path, device) as server:
        picture = server.engine.picture

        async def scarce(file: bytes, *others: object) -> object:
            if file == FILES["PNG"]:
                raise ResourceExhausted("no memory for it")
            return await picture(file, *others)

        server.engine.picture = scarce
        message, answer = answered(server.channel, [FILES["JPEG"], FILES["PNG"]], pb.Rendering())
    (failure,) = message.failures
    assert (failure.example, failure.code, failure.message) == (1, ResourceExhausted.code, "no memory for it")
    assert not message.examples[1].rendered
    assert np.isnan(answer.maps[1]).all()
    assert_same_picture(message.examples[0].rendered[0], answer.overlay(0))


def test_drawing_leaves_the_event_loop_free(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a picture is being drawn, for as long as the test chooses, other requests are answered."""
    drawing, go_on = threading.Event(), threading.Event()
    png = _rendering._png

    def slow(*arguments: object) -> bytes:
        drawing.set()
        assert go_on.wait(TIMEOUT_S)
        return png(*arguments)

    monkeypatch.setattr(_rendering, "_png", slow)
    with cropping(tmp_path, device) as server:
        asked = threading.Thread(target=answered, args=(server.channel, [FILES["JPEG"]], pb.Rendering()))
        asked.start()
        try:
            assert drawing.wait(TIMEOUT_S)
            batch = EncodedBatch([FILES["PNG"]])
            request = pb.AttributeRequest(images=batch.message, target=PREDICTED, method=GRADIENT)
            assert server.stub.Attribute(request, timeout=TIMEOUT_S).result.maps.data
        finally:
            go_on.set()
            asked.join()
        server.until_all_permits_are_back()
