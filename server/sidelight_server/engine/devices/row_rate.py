"""The row rate: how many rows a device runs per second while it is busy. Standard library only."""

HALF_LIFE_S = 10.0  # in computing time: long enough to average over chunks, short enough to follow a change of load


class RowRate:
    """Rows per second of computing, where recent chunks count most. Idle time is left out.

    Only the device's thread calls `add`; any thread may read `per_second`.
    """

    def __init__(self) -> None:
        self._n_rows = 0.0
        self._busy_s = 0.0
        self._last_end_s = 0.0
        self.per_second = 0.0  # 0 before the first chunk

    def add(self, n_rows: int, *, began_s: float, ended_s: float) -> None:
        """Record a chunk. On a GPU it may begin before the previous one has ended: that time counts once."""
        took_s = max(0.0, ended_s - max(began_s, self._last_end_s))
        kept = 0.5 ** (took_s / HALF_LIFE_S)
        self._n_rows = self._n_rows * kept + n_rows
        self._busy_s = self._busy_s * kept + took_s
        self._last_end_s = ended_s
        if self._busy_s:
            self.per_second = self._n_rows / self._busy_s

    def seconds(self, n_rows: int) -> float:
        """Return the time that rows take; 0 as long as no chunk has been timed."""
        return n_rows / self.per_second if self.per_second else 0.0
