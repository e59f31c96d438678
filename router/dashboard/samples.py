"""Prometheus text as numbers by name and labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families


class Samples:
    """All samples of one scrape."""

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples[sample.name].append((sample.labels, sample.value))

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels; 0 if there is none."""
        wanted = labels.items()
        return sum(value for found, value in self._samples.get(name, ()) if wanted <= found.items())

    def labels(self, name: str, label: str) -> list[str]:
        """Return the values that a label has among a metric's samples, sorted."""
        return sorted({found[label] for found, _ in self._samples.get(name, ()) if label in found})
