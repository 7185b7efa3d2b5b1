"""Errors of a chunk: converts them to the caller's errors, logs them, and detects a lost device."""

import logging
from collections.abc import Callable

import torch

from ...compute.saved_memory import TooLarge
from ...compute.torch_device import check_works, is_out_of_memory
from ...errors import FailedPrecondition, Internal, InvalidArgument, OutputsError, ResourceExhausted, SidelightError
from ...models.model import Model
from ...telemetry.logs import Event, Throttle
from ..active_request import ActiveRequest
from ..example_run import ExampleRun

log = logging.getLogger("sidelight")


class DeviceLostError(Exception):
    """The device is unusable for this process, as a CUDA device is after an illegal memory access."""


class ChunkErrors:
    """Turns errors on one device into those that callers get. Used by the worker's thread.

    After an unexpected error it calls `check`; if that fails too, the device is lost.
    """

    def __init__(self, device: torch.device) -> None:
        self.check: Callable[[torch.device], None] = check_works
        self.exposes_causes = False  # whether a caller gets the model's exception, or only the log
        self.n_out_of_memory = 0  # chunks that ran out of device memory
        self._device = device
        self._faults = Throttle()  # throttles log lines: each example of a batch may fail

    def part_size(self, model: Model, n_rows: int, failure: SidelightError) -> int:
        """Return how many rows of a failed chunk to run at once now; 0: none can.

        That is what fits into memory, else half of the rows, which stays the limit for a while after a lack of memory.
        """
        if isinstance(failure, TooLarge):
            return failure.fitting
        lacks_memory = isinstance(failure, ResourceExhausted)
        if lacks_memory and self._device.type == "cuda":
            torch.cuda.empty_cache()
        if n_rows == 1 or (lacks_memory and model.padded_rows):  # a half would be padded to the same number of rows
            return 0
        if lacks_memory:
            model.lacks_memory(above=n_rows // 2)
        return (n_rows + 1) // 2

    def to_domain_error(
        self, active: ActiveRequest, example_run: ExampleRun, error: BaseException, *, n_rows: int = 1
    ) -> SidelightError:
        """Log an exception and return the error for the caller. Raises `DeviceLostError` if the device is lost."""
        name, index = active.model.name, example_run.index
        if isinstance(error, SidelightError):
            if isinstance(error, Internal | OutputsError) and n_rows == 1:
                self._faults.log(
                    logging.ERROR, Event("model_failed", model=name, id=active.id, example=index, message=error.message)
                )
            if isinstance(error, TooLarge) and not error.fitting:
                self._faults.log(
                    logging.WARNING, Event("too_large", model=name, id=active.id, example=index, message=error.message)
                )
            return FailedPrecondition(f'model "{name}": {error.message}') if isinstance(error, OutputsError) else error
        if is_out_of_memory(error):
            self.n_out_of_memory += 1
            filled = active.model.padded_rows
            example = {"id": active.id, "example": index} if n_rows == 1 else {}  # a chunk of several rows is retried
            self._faults.log(logging.WARNING, Event("out_of_memory", model=name, rows=max(n_rows, filled), **example))
            what = f"{filled} rows, which it always runs at once (reproducible_rows)" if filled > 1 else "one example"
            return ResourceExhausted(f'model "{name}": out of device memory on {what}')
        self.check_device(error)
        shape, cause_text = active.prepared.shape, f"{type(error).__name__}: {error}"
        if not active.model.has_run_on(shape):
            if n_rows == 1:
                cause_text = cause_text.partition("\n")[0]
                cause = None if active.model.has_run else error  # which may be a bug of the model
                self._faults.log(
                    logging.WARNING,
                    Event("shape_failed", model=name, id=active.id, shape=shape, message=cause_text),
                    cause,
                )
            return InvalidArgument(
                f'images: model "{name}", which has no fixed input size, fails on [C, H, W] = {list(shape)}, '
                "and has run on no example of that shape" + (f": {cause_text}" if self.exposes_causes else "")
            )
        if n_rows == 1:
            self._faults.log(logging.ERROR, Event("model_failed", model=name, id=active.id, example=index), error)
        if self.exposes_causes:
            return Internal(f'model "{name}" failed on example {index}: {cause_text}')
        return Internal(f'model "{name}" failed on example {index}; the server\'s log has the cause')

    def check_device(self, error: BaseException) -> None:
        """After an unexpected error, raise `DeviceLostError` if the device no longer works."""
        for is_last in (False, True):  # the first check may report the same error again although the device still works
            try:
                self.check(self._device)
                return
            except BaseException as failure:
                if is_out_of_memory(failure):
                    return
                if is_last:
                    raise DeviceLostError(str(failure).partition("\n")[0]) from error
