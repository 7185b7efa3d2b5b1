"""The counters of a server, read from its registry."""

from sidelight_server.telemetry.recorder import Telemetry


def count_of(telemetry: Telemetry, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have these labels, whatever their others are."""
    samples = (sample for family in telemetry.counters.registry.collect() for sample in family.samples)
    return sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items())
