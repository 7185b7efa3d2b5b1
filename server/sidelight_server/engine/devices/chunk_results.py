"""The results of a chunk: folds the outputs of its rows into their examples, and stores what is finished."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...compute.staging import Staging
from ...methods.method import HostMaps, RowOutput
from ..active_request import ActiveRequest
from ..example_run import ExampleRun, Result, Row
from .chunk_errors import ChunkErrors
from .running_chunk import wait_for_maps


class ChunkResults:
    """Folds and stores the outputs of chunks, on the device's thread. An error fails the example that it is of."""

    def __init__(self, errors: ChunkErrors, staging: Staging) -> None:
        self._errors = errors
        self._staging = staging

    def fold(self, rows: Sequence[tuple[ActiveRequest, Row]], outputs: Sequence[RowOutput]) -> None:
        """Fold the outputs in row order, and store the results of examples that have one."""
        finished: dict[ExampleRun, tuple[ActiveRequest, Result]] = {}
        for (active, row), output in zip(rows, outputs, strict=True):
            if active.cancelled:
                continue
            try:
                row.example_run.fold(row, output)
            except BaseException as error:
                active.fail(row.example_run, self._errors.to_domain_error(active, row.example_run, error))
                continue
            if row.example_run.result is not None:
                finished[row.example_run] = active, row.example_run.result
                row.example_run.result = None
        try:
            self._store(finished)
        except BaseException as error:  # no host memory for the answers
            for example_run, (active, _) in finished.items():
                active.fail(example_run, self._errors.to_domain_error(active, example_run, error))

    def _store(self, finished: dict[ExampleRun, tuple[ActiveRequest, Result]]) -> None:
        maps = _to_host([result for _, result in finished.values()], self._staging)
        good: dict[ActiveRequest, list[tuple[ExampleRun, Result, HostMaps]]] = {}
        for (example_run, (active, result)), own in zip(finished.items(), maps, strict=True):
            if all(map(math.isfinite, own.largest.tolist())):
                good.setdefault(active, []).append((example_run, result, own))
            else:
                active.fail(example_run, self._errors.to_domain_error(active, example_run, example_run.not_finite()))
        for active, results in good.items():
            active.store_results(results)


def _to_host(results: Sequence[Result], staging: Staging) -> list[HostMaps]:
    """Return each result's maps on the host. Maps of the same shape on the device are copied together."""
    alike: dict[tuple[torch.Size, torch.dtype], list[tuple[int, tuple[Tensor, ...]]]] = {}
    on_host: dict[int, HostMaps] = {}
    for index, result in enumerate(results):
        maps = result.maps
        if isinstance(maps, HostMaps):
            on_host[index] = maps
        else:
            wide = maps[0].dtype if result.is_exact else torch.float32
            alike.setdefault((maps[0].shape, wide), []).append((index, maps))
    for (_, wide), group in alike.items():
        stacked = torch.stack([map_ for _, maps in group for map_ in maps])
        host = wait_for_maps(staging.to_host(stacked.to(wide)))
        end = 0
        for index, maps in group:
            start, end = end, end + len(maps)
            on_host[index] = HostMaps(*host, start, end)
    return [on_host[index] for index in range(len(results))]
