"""The Open Inference Protocol: requests, answers, and errors for invalid input."""

import asyncio
import contextlib
import io
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import grpc
import numpy as np
import pytest
import sidelight
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from sidelight.methods.parsing import parse_method
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.interop.open_inference import inference_pb2 as oip
from sidelight_server.interop.open_inference.outputs import DEFAULT

from support.messages.attribution import ask, floats, maps_of
from support.messages.inference import call, infer_request, parameter, stream, tensor, tensors_of, wanted
from support.models import Linear, sized_cnn
from support.servers.running import TIMEOUT_S, Running, gated, serving

Status = grpc.StatusCode
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3), np.uint8)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Two models: one of closed form, and one that takes files."""
    engine = Engine([ModelSpec(Linear(), name="linear"), sized_cnn()], Settings(device="cpu", threads=1))
    with serving(engine, "127.0.0.1:0") as server:
        infer(server, infer_request(floats(1)))  # without an input size, the first rows show how many classes there are
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[sidelight.Client]:
    with sidelight.connect(server.server.addresses[0]) as client:
        yield client


def infer(server: Running, request: oip.ModelInferRequest) -> dict[str, np.ndarray]:
    return tensors_of(call(server.channel, "ModelInfer", request))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def packed(*files: bytes) -> bytes:
    return b"".join(len(each).to_bytes(4, "little") + each for each in files)


def files_request(n: int, **fields: object) -> oip.ModelInferRequest:
    image = oip.ModelInferRequest.InferInputTensor(name="images", datatype="BYTES", shape=[n])
    return oip.ModelInferRequest(**{"model_name": "small", "inputs": [image]} | fields)


# What an answer has


def test_a_request_without_parameters_gets_the_map_of_the_predicted_class(server: Running) -> None:
    images = floats(2)
    got = infer(server, infer_request(images))
    ours = server.stub.Attribute(ask(images), timeout=TIMEOUT_S)
    assert tuple(got) == DEFAULT
    assert got["maps"].tobytes() == maps_of(ours).tobytes()
    assert got["predicted"].tolist() == [each.prediction.index for each in ours.result.examples]
    assert got["probability"].tolist() == [each.prediction.probability for each in ours.result.examples]
    assert got["explained"].tolist() == got["predicted"].tolist()
    assert got["score"].tolist() == [each.targets[0].score for each in ours.result.examples]
    assert got["saturated"].tolist() == [False, False]
    np.testing.assert_allclose(got["probabilities"].sum(axis=1), 1, rtol=1e-6)  # ten floats
    assert got["failures"].tolist() == [b"", b""]
    provenance = json.loads(got["provenance"][0])
    assert provenance["model_digest"] == ours.result.provenance.model_digest
    assert provenance["example_digests"] == list(ours.result.provenance.example_digests)


def test_the_server_draws_the_maps_if_it_is_asked_to(server: Running) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    files = [png(picture), b"no picture", png(picture)]
    request = files_request(3, raw_input_contents=[packed(*files)])
    request.outputs.add(name="rendered")
    got = infer(server, request)
    ours = pb.AttributeRequest(
        model="small",
        images=tensor_pb2.Images(encoded=tensor_pb2.EncodedImages(files=files)),
        method=pb.Method(gradient=pb.GradientMethod()),
        target=pb.Target(predicted=pb.PredictedTarget()),
        output=pb.Output(rendered=pb.Rendering()),
    )
    examples = server.stub.Attribute(ours, timeout=TIMEOUT_S).result.examples
    pictures = [example.rendered[0] if example.rendered else b"" for example in examples]
    assert got["rendered"].tolist() == pictures
    assert [each[:4] for each in pictures] == [b"\x89PNG", b"", b"\x89PNG"]


METHODS = {
    "another method": {"sidelight_method": "integrated_gradients(steps=5, rule=midpoint)"},
    "another score": {"sidelight_score": "logit"},
    "signed": {"sidelight_method": "gradient(signed=True)", "sidelight_channels": "sum"},
    "a class": {"sidelight_target": 3},
    "a class as text": {"sidelight_target": "3"},
    "a class for each": {"sidelight_target": "3,4"},
}


@pytest.mark.parametrize("parameters", METHODS.values(), ids=METHODS)
def test_parameters_are_the_options_of_our_client(
    parameters: dict[str, object], server: Running, client: sidelight.Client
) -> None:
    images = floats(2)
    method = parse_method(str(parameters.get("sidelight_method", "gradient")))
    target = parameters.get("sidelight_target")
    if isinstance(target, str):
        target = [int(each) for each in target.split(",")] if "," in target else int(target)
    ours = client.attribute(
        images,
        model="linear",
        method=method,
        target=target,
        score=parameters.get("sidelight_score", "probability"),
        channels=parameters.get("sidelight_channels", "max_abs"),
    )
    got = infer(
        server, infer_request(images, model_name="linear", parameters=parameters, outputs=["maps", "explained"])
    )
    assert got["maps"].tobytes() == ours.maps.tobytes()
    assert got["explained"].tolist() == [each.index for each in ours.targets]


def test_a_label_is_a_target(server: Running) -> None:
    with pytest.raises(grpc.RpcError, match="no label") as caught:  # the model has none
        infer(server, infer_request(floats(1), parameters={"sidelight_target": "cat"}))
    assert caught.value.code() in (Status.NOT_FOUND, Status.FAILED_PRECONDITION)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_smaller_maps_times_their_scales_are_the_maps(dtype: str, server: Running, client: sidelight.Client) -> None:
    images = floats(2)
    got = infer(server, infer_request(images, outputs=["maps", "scales"], parameters={"sidelight_map_dtype": dtype}))
    assert got["maps"].dtype == dtype
    whole = (got["maps"].astype(np.float64) * got["scales"][:, None, None]).astype(np.float32)
    assert whole.tobytes() == client.attribute(images, map_dtype=dtype).maps.tobytes()


def test_outputs_come_as_asked_and_ids_echo(server: Running) -> None:
    response = call(server.channel, "ModelInfer", infer_request(floats(1), outputs=["score", "maps"], id="mine"))
    assert [each.name for each in response.outputs] == ["score", "maps"]
    assert (response.id, response.model_name, response.model_version) == ("mine", "linear", "1")


def test_names_that_are_not_ours_are_left_alone(server: Running) -> None:
    parameters = {"triton_enable_empty_final_response": True, "sequence_id": 7, "priority": 1, "timeout": 20_000_000}
    assert infer(server, infer_request(floats(1), parameters=parameters))


def test_no_examples_get_no_maps(server: Running) -> None:
    got = infer(server, infer_request(floats(0)))
    assert got["maps"].shape[0] == got["predicted"].shape[0] == got["failures"].shape[0] == 0


# How images come


def typed(images: np.ndarray) -> oip.InferTensorContents:
    if images.dtype == np.uint8:  # packed varints
        numbers = b"".join(bytes([each]) if each < 128 else bytes([each & 127 | 128, 1]) for each in images.flat)
        return oip.InferTensorContents(uint_contents=[numbers])
    field = {"float32": "fp32_contents", "float64": "fp64_contents"}[images.dtype.name]
    return oip.InferTensorContents(**{field: [images.tobytes()]})


@pytest.mark.parametrize("images", [PIXELS, floats(2), floats(2).astype(np.float64)], ids=lambda each: each.dtype.name)
def test_typed_contents_are_what_raw_ones_are(images: np.ndarray, server: Running) -> None:
    model = "small" if images.dtype == np.uint8 else "linear"
    raw = infer(server, infer_request(images, model_name=model, outputs=["maps"]))
    request = infer_request(images, model_name=model, outputs=["maps"], raw_input_contents=[])
    request.inputs[0].contents.CopyFrom(typed(images))
    assert infer(server, request)["maps"].tobytes() == raw["maps"].tobytes()


def test_every_uint8_is_read_from_a_varint(server: Running) -> None:
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    request = infer_request(ramp, model_name="small", outputs=["maps"])
    raw = infer(server, request)["maps"]
    del request.raw_input_contents[:]
    request.inputs[0].contents.CopyFrom(typed(ramp))
    assert infer(server, request)["maps"].tobytes() == raw.tobytes()


def test_half_floats_are_read(server: Running) -> None:
    images = floats(2)
    half = infer(server, infer_request(images.astype(np.float16), outputs=["maps"]))["maps"]
    same = infer(server, infer_request(images.astype(np.float16).astype(np.float32), outputs=["maps"]))["maps"]
    assert half.tobytes() == same.tobytes()
    brain = (images.view(np.uint32) >> 16).astype("<u2")
    request = infer_request(images, outputs=["maps"], raw_input_contents=[brain.tobytes()])
    request.inputs[0].datatype = "BF16"
    widened = (brain.astype(np.uint32) << 16).view(np.float32)
    assert infer(server, request)["maps"].tobytes() == infer(server, infer_request(widened))["maps"].tobytes()


@pytest.mark.parametrize("how", ["raw", "typed"])
def test_one_bad_file_fails_alone(how: str, server: Running, client: sidelight.Client) -> None:
    files = [png(PIXELS[0]), b"no picture", png(PIXELS[1])]
    request = files_request(3)
    if how == "raw":
        request.raw_input_contents.append(packed(*files))
    else:
        request.inputs[0].contents.bytes_contents.extend(files)
    got = infer(server, request)
    ours = client.attribute(files, model="small", on_error="return")
    assert got["maps"].tobytes() == ours.maps.tobytes()
    assert np.isnan(got["maps"][1]).all()
    assert got["failures"][1].startswith(b"INVALID_ARGUMENT: ")
    assert got["failures"][[0, 2]].tolist() == [b"", b""]
    assert got["predicted"][1] == got["explained"][1] == -1
    assert math.isnan(got["probability"][1])
    assert math.isnan(got["score"][1])


# What bad input gets


def with_input(request: oip.ModelInferRequest, **fields: object) -> oip.ModelInferRequest:
    for name, value in fields.items():
        if isinstance(value, list):
            del getattr(request.inputs[0], name)[:]
            getattr(request.inputs[0], name).extend(value)
        else:
            setattr(request.inputs[0], name, value)
    return request


def good(**fields: object) -> oip.ModelInferRequest:
    return infer_request(floats(1), **fields)


BAD: dict[str, tuple[Callable[[], oip.ModelInferRequest], Status, str]] = {
    "model": (lambda: good(model_name="linaer"), Status.NOT_FOUND, 'did you mean "linear"'),
    "version": (lambda: good(model_version="7"), Status.NOT_FOUND, 'model_version: "7" is not served; version 1 is'),
    "output": (lambda: good(outputs=["map"]), Status.NOT_FOUND, 'outputs: there is no "map"; did you mean "maps"'),
    "output twice": (lambda: good(outputs=["maps", "maps"]), Status.INVALID_ARGUMENT, "requested twice"),
    "classification": (
        lambda: good(outputs=[wanted("probabilities", classification=3)]),
        Status.INVALID_ARGUMENT,
        "outputs.probabilities.parameters.classification",
    ),
    "no input": (lambda: good(inputs=[]), Status.INVALID_ARGUMENT, "inputs: got none, expected one input"),
    "input name": (lambda: with_input(good(), name="image"), Status.INVALID_ARGUMENT, "expected one input"),
    "two inputs": (lambda: good(inputs=[tensor(floats(1))] * 2), Status.INVALID_ARGUMENT, "expected one input"),
    "datatype": (lambda: with_input(good(), datatype="INT64"), Status.INVALID_ARGUMENT, "inputs.images.datatype: got"),
    "shape": (lambda: with_input(good(), shape=[4]), Status.INVALID_ARGUMENT, r"images\.shape: \[4\]"),
    "negative shape": (lambda: with_input(good(), shape=[-1, 3, 4, 5]), Status.INVALID_ARGUMENT, "no negative"),
    "byte count": (lambda: good(raw_input_contents=[b"1234"]), Status.INVALID_ARGUMENT, "needs 240 bytes, data has 4"),
    "no bytes": (lambda: good(raw_input_contents=[]), Status.INVALID_ARGUMENT, "data has 0"),
    "two raw": (lambda: good(raw_input_contents=[b"", b""]), Status.INVALID_ARGUMENT, "raw_input_contents: 2 entries"),
    "typed and raw": (
        lambda: good(inputs=[_with_contents(tensor(floats(1)))]),
        Status.INVALID_ARGUMENT,
        "contents: set beside",
    ),
    "a number above 255": (
        lambda: _typed_pixels(b"\xac\x02"),
        Status.INVALID_ARGUMENT,
        "uint_contents: 300, expected 0 to 255",
    ),
    "a number cut short": (lambda: _typed_pixels(b"\xff"), Status.INVALID_ARGUMENT, "truncated"),
    "parameter": (
        lambda: good(parameters={"sidelight_methods": "x"}),
        Status.INVALID_ARGUMENT,
        'did you mean "sidelight_method"',
    ),
    "method": (
        lambda: good(parameters={"sidelight_method": "gradent"}),
        Status.INVALID_ARGUMENT,
        r"parameters\.sidelight_method: got 'gradent'.*did you mean 'gradient'",
    ),
    "method of another type": (
        lambda: good(parameters={"sidelight_method": 3}),
        Status.INVALID_ARGUMENT,
        "sidelight_method: got int64_param",
    ),
    "score": (
        lambda: good(parameters={"sidelight_score": "p"}),
        Status.INVALID_ARGUMENT,
        r"parameters\.sidelight_score",
    ),
    "timeout": (lambda: good(parameters={"timeout": -1}), Status.INVALID_ARGUMENT, "timeout: .*expected a positive"),
    "target": (
        lambda: good(parameters={"sidelight_target": "9" * 30}),
        Status.INVALID_ARGUMENT,
        "parameters.sidelight_target",
    ),
    "class": (lambda: good(parameters={"sidelight_target": 10}), Status.INVALID_ARGUMENT, "10"),
    "id": (lambda: good(id="x" * 200), Status.INVALID_ARGUMENT, "id: 200 bytes"),
    "region": (
        lambda: good(inputs=[tensor(floats(1), shared_memory_region="a")], raw_input_contents=[]),
        Status.NOT_FOUND,
        'region "a" is not registered',
    ),
    "region of an output": (
        lambda: good(outputs=[wanted("score", shared_memory_region="a")]),
        Status.NOT_FOUND,
        'region "a"',
    ),
    "files that are too few": (
        lambda: files_request(2, raw_input_contents=[packed(b"a")]),
        Status.INVALID_ARGUMENT,
        "hold 1 elements",
    ),
    "files that are too many": (
        lambda: files_request(1, raw_input_contents=[packed(b"a", b"b")]),
        Status.INVALID_ARGUMENT,
        "expected the 5",
    ),
    "a file that is cut short": (
        lambda: files_request(1, raw_input_contents=[b"\x09\0\0\0a"]),
        Status.INVALID_ARGUMENT,
        "but 1 are left",
    ),
    "many files": (lambda: files_request(10**9), Status.INVALID_ARGUMENT, "at most 4096"),
}


def _with_contents(image: oip.ModelInferRequest.InferInputTensor) -> oip.ModelInferRequest.InferInputTensor:
    image.contents.fp32_contents.append(b"")
    return image


def _typed_pixels(numbers: bytes) -> oip.ModelInferRequest:
    request = infer_request(PIXELS[:1, :1, :1], model_name="small", raw_input_contents=[])
    request.inputs[0].contents.uint_contents.append(numbers)
    return request


@pytest.mark.parametrize(("make", "code", "pattern"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_named(
    make: Callable[[], oip.ModelInferRequest], code: Status, pattern: str, server: Running
) -> None:
    with pytest.raises(grpc.RpcError, match=pattern) as caught:
        infer(server, make())
    assert caught.value.code() is code


@pytest.mark.parametrize(("make", "code", "pattern"), BAD.values(), ids=BAD)
def test_on_a_stream_it_is_text_and_the_stream_goes_on(
    make: Callable[[], oip.ModelInferRequest], code: Status, pattern: str, server: Running
) -> None:
    request = make()
    request.id = request.id or "bad"
    wrong, right = stream(server.channel, [request, good(id="good")])
    assert wrong.error_message.startswith(f"{code.name}: ")
    assert wrong.infer_response.id == request.id
    assert (right.error_message, right.infer_response.id) == ("", "good")


# Streams


def test_answers_keep_the_order_of_their_requests(server: Running) -> None:
    long = {"sidelight_method": "integrated_gradients(steps=200)"}
    requests = [good(id=str(n), parameters=long if n % 3 == 0 else {}, outputs=["predicted"]) for n in range(9)]
    requests.insert(4, good(id="bad", parameters={"sidelight_score": "none"}))
    answers = list(stream(server.channel, requests))
    assert [each.infer_response.id for each in answers] == [each.id for each in requests]


def test_requests_of_a_stream_need_no_ids(server: Running) -> None:
    answers = list(stream(server.channel, [good(), good(id="x"), good(id="x")]))
    assert [each.infer_response.id for each in answers] == ["", "x", "x"]
    assert not any(each.error_message for each in answers)


def test_what_cannot_be_decoded_does_not_end_a_stream(server: Running) -> None:
    method = server.channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        response_deserializer=oip.ModelStreamInferResponse.FromString,
    )
    wrong, right = method(iter([b"\xff\xff", good().SerializeToString()]), timeout=TIMEOUT_S)
    assert wrong.error_message.startswith("INVALID_ARGUMENT: message: 2 bytes")
    assert not right.error_message


def test_a_stream_at_its_maximum_age_says_so(tmp_path: Path) -> None:
    engine = Engine([ModelSpec(Linear(), name="linear")], Settings(device="cpu", threads=1, max_stream_age_s=0.2))
    with serving(engine, f"unix:{tmp_path}/socket") as server:
        with pytest.raises(grpc.RpcError, match="start another") as caught:
            list(stream(server.channel, itertools.chain([good()], _wait_forever())))
        assert caught.value.code() is Status.UNAVAILABLE


def _wait_forever() -> Iterator[oip.ModelInferRequest]:
    threading.Event().wait(TIMEOUT_S)
    yield from ()


# What the server tells


def test_the_server_reports_its_metadata(server: Running) -> None:
    response = call(server.channel, "ServerMetadata", oip.ServerMetadataRequest())
    assert response.name == "sidelight"
    assert {"model_configuration", "statistics", "sidelight"} <= set(response.extensions)
    assert "system_shared_memory" not in response.extensions  # not allowed
    assert call(server.channel, "ServerLive", oip.ServerLiveRequest()).live
    assert call(server.channel, "ServerReady", oip.ServerReadyRequest()).ready
    ready = {
        (name, version): call(server.channel, "ModelReady", oip.ModelReadyRequest(name=name, version=version)).ready
        for name, version in (("linear", ""), ("linear", "1"), ("linear", "2"), ("other", ""))
    }
    assert ready == {("linear", ""): True, ("linear", "1"): True, ("linear", "2"): False, ("other", ""): False}


def test_metadata_are_those_of_an_answer(server: Running) -> None:
    response = call(server.channel, "ModelMetadata", oip.ModelMetadataRequest(name="small"))
    assert [(each.name, each.datatype, list(each.shape)) for each in response.inputs] == [
        ("images", "UINT8", [-1, -1, -1, 3])
    ]
    answer = call(server.channel, "ModelInfer", infer_request(PIXELS, model_name="small"))
    for expected, got in zip((each for each in response.outputs if each.name in DEFAULT), answer.outputs, strict=True):
        assert (expected.name, expected.datatype) == (got.name, got.datatype)
        assert all(size in (-1, each) for size, each in zip(expected.shape, got.shape, strict=True)), got
    config = call(server.channel, "ModelConfig", oip.ModelConfigRequest(name="small")).config
    assert config.max_batch_size > 1
    assert [each.name for each in config.output] == [each.name for each in response.outputs]
    assert list(config.output[0].dims) == list(response.outputs[0].shape)[1:]
    for name in ("ModelMetadata", "ModelConfig", "ModelStatistics"):
        with pytest.raises(grpc.RpcError, match="smal") as caught:
            call(server.channel, name, getattr(oip, f"{name}Request")(name="smal"))
        assert caught.value.code() is Status.NOT_FOUND


def test_the_index_lists_the_models(server: Running) -> None:
    response = call(server.channel, "RepositoryIndex", oip.RepositoryIndexRequest())
    assert [(each.name, each.version, each.state) for each in response.models] == [
        ("linear", "1", "READY"),
        ("small", "1", "READY"),
    ]


def test_statistics_count_what_both_services_answered(server: Running) -> None:
    def statistics() -> oip.ModelStatistics:
        return call(server.channel, "ModelStatistics", oip.ModelStatisticsRequest(name="linear")).model_stats[0]

    before = statistics()
    server.stub.Attribute(ask(floats(3)), timeout=TIMEOUT_S)
    infer(server, infer_request(floats(2)))
    with contextlib.suppress(grpc.RpcError):
        infer(server, good(raw_input_contents=[b"1"], model_name="linear"))
    after = statistics()
    assert after.inference_count - before.inference_count == 5
    assert after.execution_count - before.execution_count == 2
    assert after.inference_stats.success.count - before.inference_stats.success.count == 2
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    assert after.last_inference > before.last_inference
    every = call(server.channel, "ModelStatistics", oip.ModelStatisticsRequest())
    assert [each.name for each in every.model_stats] == ["linear", "small"]


def test_health_and_reflection_name_the_service(server: Running) -> None:
    request = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")
    assert health_pb2_grpc.HealthStub(server.channel).Check(request, timeout=TIMEOUT_S).status == 1


def test_its_messages_live_beside_those_of_other_packages() -> None:
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")


# System shared memory


@pytest.fixture
def sharing() -> Iterator[Running]:
    """A server that allows the folder of `multiprocessing.SharedMemory`."""
    settings = Settings(device="cpu", threads=1, shared_memory=Path("/dev/shm"), max_stream_regions=3)
    with serving(Engine([ModelSpec(Linear(), name="linear")], settings), "127.0.0.1:0") as server:
        yield server


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory(create=True, size=64 * 1024)
    yield memory
    memory.close()
    memory.unlink()


def register(channel: grpc.Channel, name: str, memory: SharedMemory, *, offset: int = 0, size: int = 32 * 1024) -> None:
    request = oip.SystemSharedMemoryRegisterRequest(name=name, key=f"/{memory.name}", offset=offset, byte_size=size)
    call(channel, "SystemSharedMemoryRegister", request)


def regions(channel: grpc.Channel) -> list[str]:
    return sorted(call(channel, "SystemSharedMemoryStatus", oip.SystemSharedMemoryStatusRequest()).regions)


def test_images_and_outputs_go_through_regions(sharing: Running, memory: SharedMemory) -> None:
    images = floats(2)
    inline = tensors_of(call(sharing.channel, "ModelInfer", infer_request(images)))
    register(sharing.channel, "in", memory)
    register(sharing.channel, "out", memory, offset=32 * 1024)
    memory.buf[100 : 100 + images.nbytes] = images.tobytes()
    place = {"shared_memory_region": "in", "shared_memory_byte_size": images.nbytes, "shared_memory_offset": 100}
    outputs = [
        wanted("maps", shared_memory_region="out", shared_memory_byte_size=2000),
        "predicted",
        wanted("score", shared_memory_region="out", shared_memory_byte_size=16, shared_memory_offset=8000),
    ]
    request = infer_request(images, outputs=outputs, inputs=[tensor(images, **place)], raw_input_contents=[])
    response = call(sharing.channel, "ModelInfer", request)
    assert [len(each) for each in response.raw_output_contents] == [0, 16, 0]
    assert response.outputs[0].parameters["shared_memory_byte_size"].int64_param == inline["maps"].nbytes
    out = memory.buf[32 * 1024 :]
    assert bytes(out[: inline["maps"].nbytes]) == inline["maps"].tobytes()
    assert bytes(out[8000:8016]) == inline["score"].tobytes()
    assert tensors_of(response)["predicted"].tolist() == inline["predicted"].tolist()
    out.release()


def test_files_come_from_a_region(memory: SharedMemory) -> None:
    settings = Settings(device="cpu", threads=1, shared_memory=Path("/dev/shm"))
    content = packed(png(PIXELS[0]), b"none")
    memory.buf[: len(content)] = content
    with serving(Engine([sized_cnn()], settings), "127.0.0.1:0") as server:
        register(server.channel, "in", memory)
        inline = infer(server, files_request(2, raw_input_contents=[content]))
        request = files_request(2)
        request.inputs[0].parameters["shared_memory_region"].CopyFrom(parameter("in"))
        request.inputs[0].parameters["shared_memory_byte_size"].CopyFrom(parameter(len(content)))
        got = infer(server, request)
        assert got["maps"].tobytes() == inline["maps"].tobytes()
        assert got["failures"].tolist() == inline["failures"].tolist()


def from_region(region: str = "a", *, size: int = 240, offset: int = 0) -> oip.ModelInferRequest:
    place = {"shared_memory_region": region, "shared_memory_byte_size": size, "shared_memory_offset": offset}
    return good(inputs=[tensor(floats(1), **place)], raw_input_contents=[])


OUTSIDE: dict[str, tuple[Callable[[], oip.ModelInferRequest], str]] = {
    "behind the end": (lambda: from_region(offset=32 * 1024 - 239), "do not lie within region"),
    "before the start": (lambda: from_region(offset=-8), "expected none negative"),
    "another size": (lambda: from_region(size=239), "shared_memory_byte_size: 239"),
    "maps behind the end": (
        lambda: good(outputs=[wanted("maps", shared_memory_region="a", shared_memory_offset=32 * 1024)]),
        "do not lie within region",
    ),
    "maps too large": (
        lambda: good(outputs=[wanted("maps", shared_memory_region="a", shared_memory_byte_size=79)]),
        "79, the maps need 80",
    ),
    "scores too large": (
        lambda: good(outputs=[wanted("score", shared_memory_region="a", shared_memory_byte_size=7)]),
        r"score.*: 7, but shape \[1\] of FP64 needs 8 bytes",
    ),
}


@pytest.mark.parametrize(("make", "pattern"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_does_not_lie_in_a_region_is_refused(
    make: Callable[[], oip.ModelInferRequest], pattern: str, sharing: Running, memory: SharedMemory
) -> None:
    register(sharing.channel, "a", memory)
    with pytest.raises(grpc.RpcError, match=pattern) as caught:
        infer(sharing, make())
    assert caught.value.code() is Status.INVALID_ARGUMENT
    assert infer(sharing, good())


def test_regions_have_limits(sharing: Running, memory: SharedMemory, server: Running) -> None:
    register(sharing.channel, "a", memory)
    for name, size, key, code in (
        ("a", 8, memory.name, Status.INVALID_ARGUMENT),  # is there already
        ("", 8, memory.name, Status.INVALID_ARGUMENT),
        ("b", 0, memory.name, Status.INVALID_ARGUMENT),
        ("b", 2**40, memory.name, Status.RESOURCE_EXHAUSTED),
        ("b", 65 * 1024, memory.name, Status.DATA_LOSS),  # more than the file has
        ("b", 8, "no-such-file", Status.NOT_FOUND),
        ("b", 8, "../shm/" + memory.name, Status.INVALID_ARGUMENT),
    ):
        request = oip.SystemSharedMemoryRegisterRequest(name=name, key=key, byte_size=size)
        with pytest.raises(grpc.RpcError) as caught:
            call(sharing.channel, "SystemSharedMemoryRegister", request)
        assert caught.value.code() is code, (name, size, key)
    for name in ("b", "c"):
        register(sharing.channel, name, memory)
    with pytest.raises(grpc.RpcError, match="max_stream_regions is 3"):
        register(sharing.channel, "d", memory)
    with pytest.raises(grpc.RpcError, match="operator has not allowed") as caught:
        register(server.channel, "a", memory)
    assert caught.value.code() is Status.FAILED_PRECONDITION


def test_a_region_ends_by_unregister(sharing: Running, memory: SharedMemory) -> None:
    for name in ("a", "b", "c"):
        register(sharing.channel, name, memory)
    for name, left in (("b", ["a", "c"]), ("b", ["a", "c"]), ("", [])):
        call(sharing.channel, "SystemSharedMemoryUnregister", oip.SystemSharedMemoryUnregisterRequest(name=name))
        assert regions(sharing.channel) == left
    with pytest.raises(grpc.RpcError, match="not registered"):
        infer(sharing, from_region())


def test_a_region_ends_with_its_connection(sharing: Running, memory: SharedMemory) -> None:
    register(sharing.channel, "mine", memory)
    own = [("grpc.use_local_subchannel_pool", 1)]  # or both channels would share a connection
    with grpc.insecure_channel(sharing.server.addresses[0], options=own) as other:
        register(other, "theirs", memory)
        assert regions(other) == ["theirs"]
        assert regions(sharing.channel) == ["mine"]  # each sees its own
        sharing.run(sharing.server._regions.sweep())
        assert regions(other) == ["theirs"]

    async def until_it_is_gone() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while len(sharing.server._regions._callers) > 1:  # noqa: ASYNC110  (the kernel tells nobody)
                await asyncio.sleep(0.05)

    sharing.run(until_it_is_gone())
    assert regions(sharing.channel) == ["mine"]


def test_a_region_ends_with_its_file(sharing: Running) -> None:
    memory = SharedMemory(create=True, size=32 * 1024)
    register(sharing.channel, "a", memory)
    memory.close()
    memory.unlink()
    sharing.run(sharing.server._regions.sweep())
    assert regions(sharing.channel) == []


def test_a_request_in_flight_keeps_its_region_open(tmp_path: Path, memory: SharedMemory) -> None:
    with gated(tmp_path, device="cpu", shared_memory=Path("/dev/shm")) as (gate, server):
        register(server.channel, "a", memory)
        images = floats(1)
        memory.buf[: images.nbytes] = images.tobytes()
        request = from_region()
        request.outputs.append(
            wanted("maps", shared_memory_region="a", shared_memory_offset=1000, shared_memory_byte_size=80)
        )
        method = server.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=oip.ModelInferRequest.SerializeToString,
            response_deserializer=oip.ModelInferResponse.FromString,
        )
        answer = method.future(request, timeout=TIMEOUT_S)
        assert gate.reached.wait(TIMEOUT_S)
        call(server.channel, "SystemSharedMemoryUnregister", oip.SystemSharedMemoryUnregisterRequest())
        gate.open()
        answer.result()
        ours = maps_of(server.stub.Attribute(ask(images), timeout=TIMEOUT_S))
        assert bytes(memory.buf[1000:1080]) == ours.tobytes()
