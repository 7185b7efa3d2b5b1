"""The question: what a caller asks of every batch, and the request that asks it of one."""

from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from sidelight.v1 import attribution_pb2 as pb

from ._errors import InvalidArgument
from ._fields import flag, span, text
from ._images import Batch
from ._methods import Method
from ._targets import Target, target_message
from ._words import Channels, MapDtype, Score, channels_number, map_dtype_number, score_number

FOR_EVER_S = 1e9  # math.inf is for ever, and so is thirty years


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of every batch of a call: all of a request but its images."""

    model: str | None
    target: Target
    method: Method
    score: Score
    channels: Channels
    probabilities: bool
    timeout: float
    map_dtype: MapDtype = "float32"
    partial: bool = False

    def template_for(self, batch: Batch) -> pb.AttributeRequest:
        """Return the message for one batch without its images. `InvalidArgument` for another number of classes."""
        template = self.template()
        classes = template.target.per_example.classes
        if template.target.WhichOneof("target") == "per_example" and len(classes) != len(batch):
            raise InvalidArgument(f"target: {len(classes)} classes for {len(batch)} examples, expected one for each")
        return template

    def template(self) -> pb.AttributeRequest:
        """Return the message without images, which says what is wrong with the question."""
        if not isinstance(self.method, Method):
            raise InvalidArgument(f"method: got {self.method!r}, expected a method, such as sidelight.Gradient()")
        return pb.AttributeRequest(
            model=model_name(self.model),
            target=target_message(self.target),
            method=self.method.message(),
            score=score_number(self.score),
            channels=channels_number(self.channels),
            output=pb.Output(
                map_dtype=map_dtype_number(self.map_dtype),
                probabilities=flag(self.probabilities, "probabilities"),
                partial=flag(self.partial, "partial"),
            ),
            timeout=duration(self.timeout),
        )


def model_name(model: str | None) -> str:
    """Return a model's name as messages have it: empty is the server's default."""
    return "" if model is None else text(model, "model")


def duration(timeout: float) -> Duration:
    """Return the message of a time in seconds, which must be positive."""
    span_s = min(span(timeout, "timeout"), FOR_EVER_S)
    return Duration(seconds=int(span_s), nanos=int(span_s % 1 * 1e9))
