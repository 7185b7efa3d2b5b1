"""Responses: converts answers, failures and models to messages."""

import functools
from collections.abc import Iterable
from dataclasses import asdict

from google.protobuf.duration_pb2 import Duration
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, tensor_pb2

from ..domain import Answer, Convergence, ExplainedTarget, Explanation, Provenance, Score
from ..engine.engine import Engine
from ..engine.registry.entry import Entry, State
from ..errors import SidelightError
from ..inputs.preprocessing import Geometry
from ..methods import Method
from ..methods.channels import Channels
from ..models.model import Model
from .enums import number_of, numbers
from .methods import method_message
from .requests import CHANNELS, SCORES
from .tensors import encoded

MAX_CACHED_BYTES = 256  # larger targets are not cached: callers choose their size


def result(answer: Answer, *, transport: pb.Transport.ValueType) -> pb.Attribution:
    """Return the message of an answer without its maps and its provenance: `wire.codec` adds them."""
    return pb.Attribution(
        examples=[
            _example(each, answer.labels, is_mismatch=is_mismatch, rendered=rendered)
            for each, is_mismatch, rendered in zip(
                answer.explanations, answer.mismatches, answer.rendered or ((),) * len(answer.explanations), strict=True
            )
        ],
        failures=[
            pb.ExampleFailure(example=each.example, code=each.code, message=each.message) for each in answer.failures
        ],
        probabilities=None if answer.probabilities is None else encoded(answer.probabilities).tensor(),
        timing=pb.Timing(
            prepare=duration(answer.timing.prepare_s),
            queue=duration(answer.timing.queue_s),
            compute=duration(answer.timing.compute_s),
            total=duration(answer.timing.total_s),
            admission=duration(answer.timing.admission_s),
            backlog=duration(answer.timing.backlog_s),
            rendering=duration(answer.timing.rendering_s) if answer.rendered else None,
        ),
        transport=transport,
        final=answer.final,
    )


def provenance(answer: Answer, message: pb.AttributeRequest) -> bytes:
    """Return a serialized `Provenance`: the fields that do not depend on the examples, and their digests."""
    request, target = answer.request, message.target.SerializeToString()
    is_small = request.method.given_baselines is None and len(target) <= MAX_CACHED_BYTES
    shared = (_shared if is_small else _shared.__wrapped__)(request.method, request.score, request.channels, target)
    digests = pb.Provenance(example_digests=answer.example_digests).SerializeToString()
    return b"".join((shared, digests, _facts(answer.provenance)))


@functools.lru_cache(maxsize=64)
def _shared(method: Method, score: Score, channels: Channels, target: bytes) -> bytes:
    """Return the fields of `Provenance` that do not depend on the examples, of a serialized target."""
    return pb.Provenance(
        method=method_message(method),
        target=pb.Target.FromString(target),
        score=number_of(SCORES, score),
        channels=number_of(CHANNELS, channels),
    ).SerializeToString()


def failure(error: SidelightError) -> pb.Failure:
    """Return the `Failure` message of an error."""
    delay = None if error.retry_delay_s is None else duration(error.retry_delay_s)
    return pb.Failure(code=error.code, message=error.message, retry_delay=delay)


def duration(seconds: float) -> Duration:
    """Return seconds as a `Duration`, rounded to nanoseconds; negative ones as 0."""
    whole, part = divmod(max(0, round(seconds * 1e9)), 1_000_000_000)
    return Duration(seconds=whole, nanos=part)


_STATES = numbers(model_pb2.ModelState, State)


def model_info(engine: Engine, entry: Entry, *, whole: bool) -> model_pb2.ModelInfo:
    """Return the `ModelInfo` of a model; labels and layers only if `whole`."""
    if not entry.models:
        return model_pb2.ModelInfo(name=entry.name, state=number_of(_STATES, entry.state))
    model = entry.models[0]
    return model_pb2.ModelInfo(
        name=model.name,
        version=model.version,
        digest=model.digest,
        state=model_pb2.MODEL_STATE_SERVING,
        input=_input(model),
        class_count=model.class_count,
        labels=model.labels if whole else (),
        scores=[number_of(SCORES, score) for score in model.scores],
        layers=model.layers if whole else (),
        precision=model.precision,
        device=str(engine.device),
        chunk_rows=model.chunk_rows,
        warmup=[model_pb2.WarmupEntry(**asdict(rate)) for rate in model.warm_up],
        reproducible=model.reproducible,
        kernel_options=model.kernel.options.names,
        call=model.adapter.summary,
        outputs=model.head.outputs if model.is_known else "",
        activation=model.head.activation if model.is_known else "",
        methods=model.methods,
        canary=model.identity.canary,
        neighbor_difference=model.neighbor_difference,
    )


def _input(model: Model) -> model_pb2.InputInfo | None:
    preprocessing = model.preprocessing
    if preprocessing is None:
        return None
    return model_pb2.InputInfo(
        channels=preprocessing.channels,
        height=preprocessing.height,
        width=preprocessing.width,
        mean=preprocessing.mean,
        std=preprocessing.std,
        resize=str(preprocessing.resize),
        interpolation=preprocessing.interpolation,
        pixel_range=_interval(preprocessing.pixel_range),
        window=_interval(preprocessing.window) if preprocessing.window else None,
    )


def _interval(ends: tuple[float, float]) -> tensor_pb2.Interval:
    return tensor_pb2.Interval(low=ends[0], high=ends[1])


def _example(
    explanation: Explanation | None, labels: tuple[str, ...], *, is_mismatch: bool | None, rendered: Iterable[bytes]
) -> pb.Example:
    if explanation is None:
        return pb.Example()
    return pb.Example(
        prediction=pb.Prediction(
            index=explanation.predicted,
            label=_label(labels, explanation.predicted),
            probability=explanation.probability,
        ),
        targets=[_target(each, labels) for each in explanation.targets],
        geometry=_geometry(explanation.geometry) if explanation.geometry else None,
        convergence=_convergence(explanation.convergence) if explanation.convergence else None,
        is_mismatch=is_mismatch,
        rendered=rendered,
    )


def _target(target: ExplainedTarget, labels: tuple[str, ...]) -> pb.ExplainedTarget:
    return pb.ExplainedTarget(
        index=target.index,
        label=_label(labels, target.index),
        score=target.score,
        saturated=target.saturated,
        against=target.against,
        negligible=target.negligible,
    )


def _convergence(convergence: Convergence) -> pb.Convergence:
    return pb.Convergence(
        rows=convergence.rows,
        error=convergence.error,
        completeness_error=convergence.completeness_error,
        relative_completeness_error=convergence.relative_completeness_error,
        tolerance=convergence.tolerance,
        is_met=convergence.is_met,
    )


def _label(labels: tuple[str, ...], index: int) -> str:
    return labels[index] if index < len(labels) else ""


def _geometry(geometry: Geometry) -> tensor_pb2.Geometry:
    return tensor_pb2.Geometry(
        original_height=geometry.original_height,
        original_width=geometry.original_width,
        scaled_height=geometry.scaled_height,
        scaled_width=geometry.scaled_width,
        crop=tensor_pb2.Box(
            top=geometry.crop_top, left=geometry.crop_left, height=geometry.crop_height, width=geometry.crop_width
        ),
        window=_interval(geometry.window) if geometry.window else None,
    )


@functools.lru_cache(maxsize=64)
def _facts(facts: Provenance) -> bytes:
    software = [pb.SoftwareVersion(name=name, version=version) for name, version in facts.software]
    return pb.Provenance(**facts._asdict() | {"software": software}).SerializeToString()
