"""Prometheus metrics of a router. Declared here alone; children are looked up once and kept.

A lookup of a labelled child costs four times the update itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# From a first token of a warm small model to a long queue; a factor of about 2 apart.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)


class ClassMetrics:
    """The metrics of one service class."""

    def __init__(self, metrics: RouterMetrics, priority_class: str) -> None:
        self.ttft = metrics.ttft.labels(priority_class)
        self.inter_token = metrics.inter_token.labels(priority_class)
        self.duration = metrics.duration.labels(priority_class)
        self.in_progress = metrics.in_progress.labels(priority_class)
        self.prompt_tokens = metrics.prompt_tokens.labels(priority_class)
        self.completion_tokens = metrics.completion_tokens.labels(priority_class)
        self.gain_captured = metrics.gain_captured.labels(priority_class)
        self.gain_possible = metrics.gain_possible.labels(priority_class)
        self.disconnects = metrics.disconnects.labels(priority_class)


class RouterMetrics:
    """All metrics of one router, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        by_class = ("priority_class",)
        counter = partial(Counter, labelnames=by_class, registry=registry)
        histogram = partial(Histogram, labelnames=by_class, registry=registry)
        self._requests = Counter(
            "proserve_router_requests_total",
            "Answered requests; status 499 is a client that left before its answer began.",
            ("route", "priority_class", "status"),
            registry=registry,
        )
        self.ttft = histogram(
            "proserve_router_time_to_first_token_seconds",
            "From a request's arrival to the first token of each sequence.",
            buckets=_SECONDS,
        )
        self.inter_token = histogram(
            "proserve_router_inter_token_seconds",
            "Between consecutive tokens of a sequence.",
            buckets=_TOKEN_SECONDS,
        )
        self.duration = histogram(
            "proserve_router_request_seconds",
            "From a request's arrival to the end of its answer.",
            buckets=_SECONDS,
        )
        self.in_progress = Gauge(
            "proserve_router_requests_in_progress",
            "Accepted requests whose answer has not ended.",
            by_class,
            registry=registry,
        )
        self.prompt_tokens = counter(
            "proserve_router_prompt_tokens_total", "Prompt tokens of accepted requests."
        )
        self.completion_tokens = counter(
            "proserve_router_completion_tokens_total", "Tokens received from nodes."
        )
        self.gain_captured = counter(
            "proserve_router_service_gain_captured_total",
            "Weight of the tokens that came before their deadline.",
        )
        self.gain_possible = counter(
            "proserve_router_service_gain_possible_total",
            "Weight of all tokens that came, and of each first token that never did.",
        )
        self.disconnects = counter(
            "proserve_router_client_disconnects_total",
            "Accepted requests whose client left before the end.",
        )
        self._upstream_errors = Counter(
            "proserve_router_upstream_errors_total",
            "Sequences that a node did not take or did not finish.",
            ("endpoint_id",),
            registry=registry,
        )
        self._endpoint_usable = Gauge(
            "proserve_router_endpoint_usable",
            "1 if the node may be sent requests now.",
            ("endpoint_id",),
            registry=registry,
        )
        self.of_class = cache(lambda name: ClassMetrics(self, name))
        self.requests = cache(self._requests.labels)
        self.upstream_errors = cache(self._upstream_errors.labels)

    def render(self, obstacles: Mapping[str, str | None]) -> bytes:
        """Return everything as Prometheus text; takes milliseconds, so call it in a thread.

        `obstacles` says for each node why it cannot be used now, None if it can.
        """
        for endpoint_id, obstacle in obstacles.items():
            self._endpoint_usable.labels(endpoint_id).set(obstacle is None)
        return generate_latest(self._registry)
