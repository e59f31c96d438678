"""What a router is told at start: where its nodes are, whom it serves, and what it refuses."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from orchestrator.core.errors import ConfigError
from orchestrator.core.slo import PriorityClass, Slo
from orchestrator.etcd import RegistryConfig
from orchestrator.peers import SecretConfig, ServiceUrl
from orchestrator.tracing import TracingConfig
from orchestrator.yaml_config import Problem, problems_error
from router.health import BreakerRules
from router.retries import RetryRules
from router.routing_config import RoutingConfig
from router.schema import ObjectiveMs

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]
"""Ends up in log lines, metric labels and headers."""


class ServiceClassConfig(BaseModel):
    """A service class that requests belong to."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Name
    """What a request's `priority` says."""

    weight: Annotated[FiniteFloat, Field(ge=0)]
    """Gain of one output token delivered in time, relative to the other classes: larger is more
    valuable."""

    ttft_ms: ObjectiveMs | None = None
    """Objective for the first token, from the request's arrival, for requests that bring none of
    their own. None promises nothing."""

    tpot_ms: ObjectiveMs | None = None
    """Objective for each later token, after the one before it. None promises nothing."""

    def to_priority_class(self) -> PriorityClass:
        """Return the core's form of this class."""
        slo = {}
        if self.ttft_ms is not None:
            slo["ttft_s"] = self.ttft_ms / 1000
        if self.tpot_ms is not None:
            slo["tpot_s"] = self.tpot_ms / 1000
        return PriorityClass(name=self.name, weight=self.weight, slo=Slo(**slo))


class EndpointConfig(BaseModel):
    """A node that the router may send requests to."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    endpoint_id: Name
    """The id that the node itself gives; a node with another id behind the address is not used."""

    url: ServiceUrl
    """Address of the node's HTTP service, as http://HOST:PORT."""


class AdmissionConfig(BaseModel):
    """What a router lets in when there is more work than its nodes can do.

    Waiting are sequences that were sent to a node and have no token yet.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    max_waiting_sequences: PositiveInt = 1024
    """Sequences that may wait for their first token, over all nodes; a request for which there is
    no place is refused with 429."""

    reserved_fraction: Annotated[FiniteFloat, Field(ge=0, lt=1)] = 0.25
    """Places kept from a class for those worth more: the second most valuable may take a place
    while less than `1 - reserved_fraction` of all are taken, the third while less than the square
    of that are, and so on."""

    client_share: Annotated[FiniteFloat, Field(gt=0)] = 2.0
    """A client of the clients file may take a place while it has fewer than this many times the
    places that are left to its class. So one alone may have two thirds of them at 2, and n that
    all want more have 2 in 2n + 1 each."""

    hopeless: Literal["queue", "demote", "refuse"] = "queue"
    """What to do with a request that can no longer earn anything on any node: let it in all the
    same; let it in as one of the least valuable class that its client may use; or refuse it with
    429 and the time after which the queues are predicted to be short enough."""


class HealthConfig(BaseModel):
    """When a node is left out, and how it is taken in again."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    breaker_failures: PositiveInt = 3
    """A node that fails on so many requests in a row gets none for a while."""

    breaker_open_s: PositiveFloat = 1.0
    """How long at first. Then one request is tried, and if that fails too, it is twice as long."""

    breaker_max_open_s: PositiveFloat = 30.0
    """How long at most."""

    slow_start_s: Annotated[FiniteFloat, Field(ge=0)] = 10.0
    """A node that comes back gets its full share of requests after this long, and a growing one
    until then, as long as other nodes can be used. 0 gives it all at once."""

    def breaker_rules(self) -> BreakerRules:
        """Return the rules of a node's circuit breaker."""
        return BreakerRules(
            num_failures=self.breaker_failures,
            first_open_s=self.breaker_open_s,
            max_open_s=self.breaker_max_open_s,
        )


class IdempotencyConfig(BaseModel):
    """What is kept of the answers to requests with an `Idempotency-Key`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    keep_s: PositiveFloat = 600.0
    """A repeated request gets the answer of the first for this long after its end."""

    max_answers: PositiveInt = 10_000
    """Answers kept and being made; further requests with a key are refused."""

    max_bytes: Annotated[ByteSize, Field(gt=0)] = ByteSize(256 * 1024 * 1024)
    """Their size, as it goes over the wire. Those that ended first make room. While those being
    made alone are larger, further requests with a key are refused."""

    abandon_after_s: PositiveFloat = 30.0
    """An answer that is being made and that no client has read for this long is given up."""

    def part_of(self, num_workers: int) -> Self:
        """Return what one of so many workers keeps; keys are spread evenly over them."""
        return self.model_copy(
            update={
                "max_answers": max(1, self.max_answers // num_workers),
                "max_bytes": ByteSize(max(1, self.max_bytes // num_workers)),
            }
        )


class ToolCallsConfig(BaseModel):
    """How the model calls functions."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format: Literal["hermes", "none"] = "hermes"
    """What the model writes: `hermes` is JSON between `<tool_call>` and `</tool_call>`, as Hermes,
    Qwen and SmolLM2 write it. A chat template without tools is helped by a preamble that explains
    this. `none` refuses tools."""


class RegistrationConfig(SecretConfig):
    """Nodes may register themselves, if they know a secret."""

    lease_s: Annotated[FiniteFloat, Field(ge=1, le=3600)] = 10.0
    """A node that has not renewed its registration for this long is forgotten. Nodes renew it
    three times as often."""

    max_nodes: PositiveInt = 256
    """Registered nodes at most; those of the configuration do not count."""


class DashboardConfig(BaseModel):
    """The page that shows what router and nodes do."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    is_enabled: bool = True
    """Serve /dashboard."""

    key: SecretConfig | None = None
    """What who wants to see the figures must know. None: they are shown on this machine alone,
    also to what a proxy on it sends on."""


class TlsConfig(BaseModel):
    """What the router shows clients that come over https."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    cert_file: Path
    """Its certificate, followed by those of who has certified it, as PEM."""

    key_file: Path
    """The certificate's private key, without a password, as PEM."""

    def check(self) -> None:
        """Raise ConfigError if the files cannot be read, or do not belong together."""
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                self.cert_file, self.key_file, password=""
            )
        except OSError as error:  # as ssl's errors are
            raise ConfigError(
                f"tls: cert_file {self.cert_file} and key_file {self.key_file} cannot be used: "
                f"{error}"
            ) from error


# Neighbouring classes are worth 2 to 1, as in the open traces of ProServe (arXiv 2512.12928);
# the objectives of `high` are those that xLLM ships, the others relax them.
DEFAULT_CLASSES = (
    ServiceClassConfig(name="high", weight=4.0, ttft_ms=1000, tpot_ms=50),
    ServiceClassConfig(name="normal", weight=2.0, ttft_ms=2000, tpot_ms=100),
    ServiceClassConfig(name="low", weight=1.0, ttft_ms=5000, tpot_ms=200),
)


class RouterSettings(RoutingConfig):
    """A router, but for the nodes behind it."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the router to the network."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """TCP port to listen on; 0 takes any free one."""

    tls: TlsConfig | None = None
    """Serve https, and nothing else. None: http, for where something before the router ends TLS."""

    num_workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that serve the port together. Limits, places and answers that are kept count for
    all of them; each follows the nodes by itself. Take one for each core that the router has."""

    classes: Annotated[tuple[ServiceClassConfig, ...], Field(min_length=1)] = DEFAULT_CLASSES
    """The service classes on offer."""

    default_class: str = "normal"
    """Class of requests that name none."""

    clients_file: Path | None = None
    """Who may use the router: a file of [ClientsConfig](#clientsconfig). None lets everybody use
    every class."""

    clients_poll_interval_s: PositiveFloat = 2.0
    """Pause between two looks at the clients file; a change counts without a restart."""

    admission: AdmissionConfig = AdmissionConfig()
    """What is let in under overload."""

    max_body_bytes: PositiveInt = 4 * 1024 * 1024
    """Larger request bodies are refused while they are being read."""

    max_sequences_per_request: PositiveInt = 128
    """Most sequences that one request may ask for: its prompts times its `n`."""

    body_timeout_s: PositiveFloat = 30.0
    """A client has this long to send its request's body."""

    connect_timeout_s: PositiveFloat = 1.0
    """A node that does not accept a connection in this time counts as unavailable."""

    stall_timeout_s: PositiveFloat = 10.0
    """A node that is silent on a request for this long has lost it. However busy it is, a node
    that works gives signs of life five times as often."""

    max_attempts: PositiveInt = 5
    """Nodes that one sequence is sent to. No node process gets it twice."""

    retry_delay_s: PositiveFloat = 0.05
    """Longest pause before a sequence that lost its node is sent to another one. It is doubled for
    each further try without a token, and each time a random part of it is waited."""

    max_retry_delay_s: PositiveFloat = 1.0
    """Longest of these pauses."""

    max_wait_s: PositiveFloat = 30.0
    """A sequence that lost its node, and finds no other, is given up after this long."""

    default_max_wait_s: Annotated[FiniteFloat, Field(ge=0)] | None = None
    """`max_wait_ms` of requests that do not say it, in seconds. None: they are sent to another node
    only while a token of them can be in time, and wait for one only if they have lost one."""

    snapshot_poll_interval_s: PositiveFloat = 0.25
    """Pause between two looks at the load of a node that does not stream it, and before a stream
    that has ended is begun again."""

    max_snapshot_age_s: PositiveFloat = 3.0
    """A node not heard of for longer gets no requests."""

    tool_calls: ToolCallsConfig = ToolCallsConfig()
    """How the model calls functions."""

    health: HealthConfig = HealthConfig()
    """When a node is left out, and how it is taken in again."""

    idempotency: IdempotencyConfig = IdempotencyConfig()
    """What is kept of the answers to requests with an `Idempotency-Key`."""

    registration: RegistrationConfig | None = None
    """Whether nodes may register themselves. None: there are only those of the configuration."""

    registry: RegistryConfig | None = None
    """etcd, which says which nodes there are, to any number of routers. None: the router's own
    configuration does."""

    tracing: TracingConfig | None = None
    """Spans of requests for OpenTelemetry. None makes none."""

    dashboard: DashboardConfig = DashboardConfig()
    """What is shown at /dashboard."""

    @property
    def class_weights(self) -> dict[str, float]:
        """Return the weight of each service class."""
        return {c.name: c.weight for c in self.classes}

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise problems_error(type(self), problems)
        return self

    def _problems(self) -> Iterator[Problem]:
        class_names = [c.name for c in self.classes]
        try:
            _check_unique("classes", class_names)
        except ValueError as error:
            yield ("classes",), str(error)
        if self.default_class not in class_names:
            yield (
                ("default_class",),
                f"default_class is {self.default_class!r}, "
                f"it must be one of the classes: {', '.join(class_names)}",
            )
        try:
            self.make_policy(self.class_weights)
        except ValueError as error:
            yield ("policy",), str(error)
        if self.max_snapshot_age_s <= self.snapshot_poll_interval_s:
            yield (
                ("max_snapshot_age_s",),
                f"max_snapshot_age_s is {self.max_snapshot_age_s}, it must exceed "
                f"snapshot_poll_interval_s, {self.snapshot_poll_interval_s}",
            )

        if self.registry is not None and self.registration is not None:
            yield (
                ("registration",),
                "registration and registry are both set, so nodes could come twice; remove one",
            )
        if self.num_workers > 1 and self.registration is not None:
            yield (
                ("num_workers",),
                f"num_workers is {self.num_workers}, but a node registers with one worker and the "
                "others would not know it; set it to 1, or list nodes and remove registration",
            )

    def retry_rules(self) -> RetryRules:
        """Return when a sequence that lost its node is sent to another one."""
        return RetryRules(
            max_attempts=self.max_attempts,
            first_delay_s=self.retry_delay_s,
            max_delay_s=self.max_retry_delay_s,
            max_wait_s=self.max_wait_s,
        )


class RouterConfig(RouterSettings):
    """One router process."""

    engine_dir: Path
    """A prebuilt engine directory of the served model, for its tokenizer and chat template."""

    model: Name
    """Name under which the model is served; nodes that serve another name are not used."""

    nodes: tuple[EndpointConfig, ...] = ()
    """Where requests may be sent. Nodes that register themselves at the router come on top; it is
    empty with a `nodes_file` or a `registry`."""

    nodes_file: Path | None = None
    """A file whose key `nodes` lists the nodes in place of this one; the router follows it."""

    @model_validator(mode="after")
    def _check_nodes(self) -> Self:
        if self.nodes_file is not None and (self.nodes or self.registration or self.registry):
            raise ValueError(
                "nodes_file lists all nodes there are; remove it, or nodes, registration and "
                "registry"
            )
        if self.registry is not None and self.nodes:
            raise ValueError("registry knows all nodes there are; remove it, or nodes")
        if not (self.nodes or self.nodes_file or self.registration or self.registry):
            raise ValueError(
                "nodes is empty and nothing says where they are, so there would never be a node; "
                "list nodes, or set nodes_file, registration or registry"
            )
        check_unique_nodes(self.nodes)
        return self


def check_unique_nodes(nodes: tuple[EndpointConfig, ...]) -> tuple[EndpointConfig, ...]:
    """Return `nodes`; raise ValueError if two have one name."""
    _check_unique("nodes", [node.endpoint_id for node in nodes])
    return nodes


def _check_unique(what: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{what}: each may be listed once, got {', '.join(names)}")
