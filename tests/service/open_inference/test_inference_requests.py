"""Requests of the Open Inference Protocol: parameters, contents and outputs, metadata and statistics."""

import contextlib
import json
import math

import grpc
import numpy as np
import pytest
import sidelight
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sidelight.methods.parsing import parse_method
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight_server.interop.open_inference import inference_pb2 as oip
from sidelight_server.interop.open_inference.outputs import DEFAULT

from support.messages.attribution import ask, floats, maps_of
from support.messages.inference import call, infer_request
from support.messages.inference_requests import PIXELS, files_request, good, infer, packed, png
from support.servers.running import TIMEOUT_S, Running

Status = grpc.StatusCode


# Contents of an answer


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


def test_parameters_of_other_programs_are_ignored(server: Running) -> None:
    parameters = {"triton_enable_empty_final_response": True, "sequence_id": 7, "priority": 1, "timeout": 20_000_000}
    assert infer(server, infer_request(floats(1), parameters=parameters))


def test_no_examples_get_no_maps(server: Running) -> None:
    got = infer(server, infer_request(floats(0)))
    assert got["maps"].shape[0] == got["predicted"].shape[0] == got["failures"].shape[0] == 0


# Forms of images


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


# Metadata, statistics and reflection


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


def test_its_messages_do_not_conflict_with_those_of_other_packages() -> None:
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
