"""The question: what a caller asks of every batch, and the request that asks it of one."""

from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from sidelight.v1 import attribution_pb2 as pb

from ._errors import InvalidArgument
from ._images import Batch
from ._methods import Channels, Method, Score, Target, channels_message, score_message, target_message

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
    partial: bool = False

    def request(self, batch: Batch, *, id_: str = "") -> pb.AttributeRequest:
        """Return the message that asks it of a batch. Every default is filled in."""
        if not self.timeout > 0:
            raise InvalidArgument(f"timeout: got {self.timeout} s, expected a positive time")
        if not isinstance(self.method, Method):
            raise InvalidArgument(f"method: got {self.method!r}, expected a method, such as sidelight.Gradient()")
        return pb.AttributeRequest(
            id=id_,
            model=self.model or "",
            images=batch.message,
            target=target_message(self.target),
            method=self.method.message(),
            score=score_message(self.score),
            channels=channels_message(self.channels),
            output=pb.Output(probabilities=self.probabilities, partial=self.partial),
            timeout=_duration(self.timeout),
        )


def _duration(seconds: float) -> Duration:
    seconds = min(seconds, FOR_EVER_S)
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
