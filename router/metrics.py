"""Prometheus metrics of a router. Declared here alone; children are looked up once and kept.

A lookup of a labelled child costs four times the update itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# From a first token of a warm small model to a long queue; a factor of about 2 apart.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)


class TokenHistogram:
    """A histogram by class that is observed once a token: plain numbers, read when the metrics
    are. The library's own takes a lock and 1 us for each observation."""

    def __init__(self, name: str, documentation: str, buckets: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._buckets = buckets
        self._children: dict[str, TokenObserver] = {}

    def labels(self, priority_class: str) -> TokenObserver:
        """Return the part of one class."""
        return self._children.setdefault(priority_class, TokenObserver(self._buckets))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield everything, as a registry wants it."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=("priority_class",))
        for priority_class, child in list(self._children.items()):
            counts = list(accumulate(child.counts))
            bounds = [*map(floatToGoString, self._buckets), "+Inf"]
            buckets = list(zip(bounds, counts, strict=True))
            family.add_metric((priority_class,), buckets, child.sum)
        yield family


class TokenObserver:
    """What was observed of one class."""

    def __init__(self, buckets: Sequence[float]) -> None:
        self._buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float, num_times: int = 1) -> None:
        """Take in a value."""
        self.counts[bisect_left(self._buckets, value)] += num_times
        self.sum += value * num_times


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
        self.sequences = {
            is_met: metrics.sequences.labels(priority_class, "met" if is_met else "missed")
            for is_met in (True, False)
        }
        """By whether the objectives were met."""


class ClientMetrics:
    """The metrics of one client of the clients file."""

    def __init__(self, metrics: RouterMetrics, client: str) -> None:
        self.prompt_tokens = metrics.client_prompt_tokens.labels(client)
        self.completion_tokens = metrics.client_completion_tokens.labels(client)
        self.gain_captured = metrics.client_gain_captured.labels(client)
        self.gain_possible = metrics.client_gain_possible.labels(client)


class FailoverMetrics:
    """What it takes that no request is lost, and none is done twice."""

    def __init__(self, registry: CollectorRegistry) -> None:
        retries = Counter(
            "proserve_router_retries_total",
            "Sequences sent to another node because one had failed on them, by whether tokens had "
            "been delivered already.",
            ("after_tokens",),
            registry=registry,
        )
        self.retries = {True: retries.labels("true"), False: retries.labels("false")}
        """By whether tokens had been delivered."""

        self.sequences_given_up = Counter(
            "proserve_router_sequences_given_up_total",
            "Sequences that no node took, or none finished.",
            registry=registry,
        )
        self.idempotent_replays = Counter(
            "proserve_router_idempotent_replays_total",
            "Requests answered with the answer of an earlier one that had the same key.",
            registry=registry,
        )
        self.kept_answer_bytes = Gauge(
            "proserve_router_kept_answer_bytes",
            "Size of the answers that are kept for repeated requests.",
            registry=registry,
        )


class RouterMetrics:
    """All metrics of one router, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
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
        self.inter_token = TokenHistogram(
            "proserve_router_inter_token_seconds",
            "Between consecutive tokens of a sequence.",
            _TOKEN_SECONDS,
        )
        registry.register(self.inter_token)
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
        self.sequences = Counter(
            "proserve_router_sequences_total",
            "Sequences that ended, by whether first token and mean time of later ones met the "
            "objectives: met or missed.",
            ("priority_class", "objectives"),
            registry=registry,
        )
        self.disconnects = counter(
            "proserve_router_client_disconnects_total",
            "Accepted requests whose client left before the end.",
        )
        self.failover = FailoverMetrics(registry)
        self._first_tokens_predicted = Counter(
            "proserve_router_first_tokens_predicted_total",
            "First tokens of sequences sent to a node, by what the routing policy expected and by "
            "what came: in_time or late.",
            ("predicted", "actual"),
            registry=self.registry,
        )
        self.first_tokens_predicted = cache(self._first_tokens_predicted.labels)
        self._declare_endpoint_metrics()
        self._declare_client_metrics()
        self.of_class = cache(lambda name: ClassMetrics(self, name))
        self.of_client = cache(lambda name: ClientMetrics(self, name))
        self.requests = cache(self._requests.labels)
        self.upstream_errors = cache(self._upstream_errors.labels)

    def _declare_endpoint_metrics(self) -> None:
        """Declare what is counted by node."""
        self._upstream_errors = Counter(
            "proserve_router_upstream_errors_total",
            "Sequences that a node did not take or did not finish.",
            ("endpoint_id",),
            registry=self.registry,
        )
        self._endpoint_usable = Gauge(
            "proserve_router_endpoint_usable",
            "1 if the node may be sent requests now.",
            ("endpoint_id",),
            registry=self.registry,
        )
        self._endpoint_sequences = Gauge(
            "proserve_router_endpoint_sequences",
            "Sequences that this router has sent to the node and that have not ended.",
            ("endpoint_id",),
            registry=self.registry,
        )
        self._rendered_endpoints: set[str] = set()
        """Those that the last scrape was told of: nodes may come and go."""

        self.registered_nodes = Gauge(
            "proserve_router_registered_nodes",
            "Nodes that have registered themselves and whose lease lasts.",
            registry=self.registry,
        )
        self.registrations = Counter(
            "proserve_router_registrations_total",
            "Registered nodes that came and went: joined, left, or expired.",
            ("event",),
            registry=self.registry,
        ).labels
        self.registry_is_followed = Gauge(
            "proserve_router_registry_is_followed",
            "1 while etcd tells of nodes as they come and go; 0 without etcd as well.",
            registry=self.registry,
        )

    def _declare_client_metrics(self) -> None:
        """Declare what is counted by client; only names of the clients file become labels."""
        counter = partial(Counter, labelnames=("client",), registry=self.registry)
        self.client_prompt_tokens = counter(
            "proserve_router_client_prompt_tokens_total", "Prompt tokens of accepted requests."
        )
        self.client_completion_tokens = counter(
            "proserve_router_client_completion_tokens_total", "Tokens received from nodes."
        )
        self.client_gain_captured = counter(
            "proserve_router_client_service_gain_captured_total",
            "Weight of the tokens that came before their deadline.",
        )
        self.client_gain_possible = counter(
            "proserve_router_client_service_gain_possible_total",
            "Weight of all tokens that came, and of each first token that never did.",
        )
        self._client_requests = Counter(
            "proserve_router_client_requests_total",
            "Answered requests of each client, as proserve_router_requests_total.",
            ("client", "priority_class", "status"),
            registry=self.registry,
        )
        self._refusals = Counter(
            "proserve_router_refusals_total",
            "Requests refused with 401, 403 or 429; without a valid key, client is empty.",
            ("client", "code", "type"),
            registry=self.registry,
        )
        self._demotions = Counter(
            "proserve_router_demotions_total",
            "Requests without hope of earning anything that were served as a lesser class.",
            ("priority_class",),
            registry=self.registry,
        )
        self._waiting = Gauge(
            "proserve_router_waiting_sequences",
            "Sequences sent to a node that have no token yet.",
            registry=self.registry,
        )
        self._clients_reloads = Counter(
            "proserve_router_clients_file_reloads_total",
            "Changes of the clients file that were found, by whether they could be applied.",
            ("outcome",),
            registry=self.registry,
        )
        self.clients_file_is_stale = Gauge(
            "proserve_router_clients_file_is_stale",
            "1 while the clients file has mistakes and the one before is in force.",
            registry=self.registry,
        )
        self.client_requests = cache(self._client_requests.labels)
        self.refusals = cache(self._refusals.labels)
        self.demotions = cache(self._demotions.labels)
        self.clients_reloads = cache(self._clients_reloads.labels)

    def render(
        self,
        obstacles: Mapping[str, str | None],
        *,
        num_waiting: int,
        num_sequences: Mapping[str, int] | None = None,
    ) -> bytes:
        """Return everything as Prometheus text; takes milliseconds, so call it in a thread.

        `obstacles` says for each node why it cannot be used now, None if it can; `num_waiting`
        sequences have no token yet; each node has `num_sequences` that have not ended.
        """
        self._waiting.set(num_waiting)
        for endpoint_id in self._rendered_endpoints - obstacles.keys():
            with suppress(KeyError):  # another scrape was faster
                self._endpoint_usable.remove(endpoint_id)
                self._endpoint_sequences.remove(endpoint_id)
        self._rendered_endpoints = set(obstacles)
        for endpoint_id, number in (num_sequences or {}).items():
            self._endpoint_sequences.labels(endpoint_id).set(number)
        for endpoint_id, obstacle in obstacles.items():
            self._endpoint_usable.labels(endpoint_id).set(obstacle is None)
        return generate_latest(self.registry)
