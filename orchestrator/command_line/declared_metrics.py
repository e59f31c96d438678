"""The metrics that a registry declares, whether anything was counted yet or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry


@dataclass(frozen=True, slots=True)
class DeclaredMetric:
    """A metric's declaration."""

    name: str
    """Without what a kind adds, such as `_total`."""

    kind: str
    labels: tuple[str, ...]
    documentation: str


def declared_metrics(registry: CollectorRegistry) -> Iterator[DeclaredMetric]:
    """Yield every metric."""
    # The library offers no other way to a metric's labels before it has any sample.
    for collector in set(registry._collector_to_names):  # noqa: SLF001
        # Our own histogram of tokens is by class.
        labels = tuple(getattr(collector, "_labelnames", ("priority_class",)))
        for family in collector.collect():
            yield DeclaredMetric(family.name, family.type, labels, family.documentation)
