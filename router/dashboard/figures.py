"""What the dashboard and `proserve top` show, computed from what is scraped. Pure.

Every number is one of `/metrics`, or a quotient or difference of such numbers over the last
seconds; the names say which. Nothing else is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from router.dashboard.samples import Samples

KV_STATES = (
    ("device", "used"), ("device", "cached"), ("device", "free"),
    ("copying", "out"), ("copying", "in"),
    ("host", "cached"), ("host", "free"),
)  # fmt: skip


class ClassFigures(msgspec.Struct, frozen=True):
    """One service class."""

    name: str
    weight: float
    requests_in_progress: float
    gain_captured: float
    gain_possible: float
    sequences_met: float
    sequences_missed: float
    completion_tokens: float
    recent_gain_per_s: float | None
    recent_gain_ratio: float | None
    """Captured of possible gain of the sequences that ended lately."""

    recent_attainment: float | None
    """Share of the sequences that ended lately that met their objectives."""

    recent_ttft_ms: float | None


class ClientFigures(msgspec.Struct, frozen=True):
    """One client of the clients file."""

    name: str
    gain_captured: float
    gain_possible: float
    completion_tokens: float
    recent_gain_ratio: float | None


class NodeFigures(msgspec.Struct, frozen=True):
    """One node. What only the node itself knows is None while it does not answer."""

    endpoint_id: str
    is_usable: bool
    obstacle: str | None
    sequences: float
    """Sent by this router and not ended."""

    running: float | None = None
    waiting: float | None = None
    urgent: float | None = None
    """Requests before the sliding boundary in the last step; `normal` those behind it."""

    normal: float | None = None
    kv_usage_fraction: float | None = None
    kv_blocks: Mapping[str, float] = {}
    """By place and state, as `device used`."""

    offloaded_bytes: float | None = None
    onboarded_bytes: float | None = None
    preemptions: float | None = None
    steps: float | None = None
    recent_offload_bytes_per_s: float | None = None
    recent_onboard_bytes_per_s: float | None = None
    recent_tokens_per_s: float | None = None
    recent_step_ms: float | None = None
    recent_predicted_step_ms: float | None = None
    recent_exposed_share: float | None = None
    """Time in which the engine waits for its next step although there is work, of all time."""


class RequestRow(msgspec.Struct, frozen=True):
    """One of the router's latest requests."""

    completion_id: str
    client: str | None
    priority_class: str
    state: str
    """`waiting` for its first token, `decoding`, or how it ended."""

    node: str | None
    """The last one that it was sent to."""

    num_nodes: int
    num_prompt_tokens: int
    num_completion_tokens: int
    age_s: float
    ttft_ms: float | None


class Picture(msgspec.Struct, frozen=True):
    """Everything at one moment."""

    at_unix_s: float
    window_s: float
    """What is called recent is of so many seconds."""

    waiting_sequences: float
    classes: Sequence[ClassFigures]
    clients: Sequence[ClientFigures]
    nodes: Sequence[NodeFigures]
    requests: Sequence[RequestRow]


@dataclass(frozen=True, slots=True)
class Observation:
    """What was scraped at one moment."""

    at_unix_s: float
    router: Samples
    nodes: Mapping[str, Samples | None]
    """By endpoint id; None for a node that did not answer."""


def class_figures(
    now: Observation, before: Observation, weights: Mapping[str, float]
) -> list[ClassFigures]:
    """Return the figures of each class, the most valuable one first."""
    return [
        _class_figures(now, before, name, weight)
        for name, weight in sorted(weights.items(), key=lambda item: -item[1])
    ]


def _class_figures(now: Observation, before: Observation, name: str, weight: float) -> ClassFigures:
    def value(metric: str, **labels: str) -> float:
        return now.router.value(f"proserve_router_{metric}", priority_class=name, **labels)

    def growth(metric: str, **labels: str) -> float:
        earlier = before.router.value(f"proserve_router_{metric}", priority_class=name, **labels)
        return value(metric, **labels) - earlier

    captured = growth("service_gain_captured_total")
    ttft_s = growth("time_to_first_token_seconds_sum")
    met = growth("sequences_total", objectives="met")
    return ClassFigures(
        name=name,
        weight=weight,
        requests_in_progress=value("requests_in_progress"),
        gain_captured=value("service_gain_captured_total"),
        gain_possible=value("service_gain_possible_total"),
        sequences_met=value("sequences_total", objectives="met"),
        sequences_missed=value("sequences_total", objectives="missed"),
        completion_tokens=value("completion_tokens_total"),
        recent_gain_per_s=_ratio(captured, now.at_unix_s - before.at_unix_s),
        recent_gain_ratio=_ratio(captured, growth("service_gain_possible_total")),
        recent_attainment=_ratio(met, growth("sequences_total")),
        recent_ttft_ms=_ratio(1e3 * ttft_s, growth("time_to_first_token_seconds_count")),
    )


def client_figures(now: Observation, before: Observation) -> list[ClientFigures]:
    """Return the figures of each client that has sent something."""
    captured, possible = (
        f"proserve_router_client_service_gain_{kind}_total" for kind in ("captured", "possible")
    )

    def growth(metric: str, client: str) -> float:
        return now.router.value(metric, client=client) - before.router.value(metric, client=client)

    return [
        ClientFigures(
            name=name,
            gain_captured=now.router.value(captured, client=name),
            gain_possible=now.router.value(possible, client=name),
            completion_tokens=now.router.value(
                "proserve_router_client_completion_tokens_total", client=name
            ),
            recent_gain_ratio=_ratio(
                now.router.value(captured, client=name)
                - before.router.value(captured, client=name),
                now.router.value(possible, client=name)
                - before.router.value(possible, client=name),
            ),
        )
        for name in now.router.labels(captured, "client")
    ]


def node_figures(
    now: Observation, before: Observation, obstacles: Mapping[str, str | None]
) -> list[NodeFigures]:
    """Return the figures of each node; `obstacles` say why one cannot be used, None if it can."""
    return [
        _node_figures(now, before, endpoint_id, obstacle)
        for endpoint_id, obstacle in sorted(obstacles.items())
    ]


def _node_figures(
    now: Observation, before: Observation, endpoint_id: str, obstacle: str | None
) -> NodeFigures:
    known = NodeFigures(
        endpoint_id=endpoint_id,
        is_usable=obstacle is None,
        obstacle=obstacle,
        sequences=now.router.value("proserve_router_endpoint_sequences", endpoint_id=endpoint_id),
    )
    node, earlier = now.nodes.get(endpoint_id), before.nodes.get(endpoint_id)
    if node is None:
        return known

    def value(metric: str, **labels: str) -> float:
        return node.value(f"proserve_node_{metric}", **labels)

    def growth(metric: str, **labels: str) -> float:
        was = 0.0 if earlier is None else earlier.value(f"proserve_node_{metric}", **labels)
        # A node that was started anew counts from 0 again.
        return max(0.0, value(metric, **labels) - was)

    interval_s = now.at_unix_s - before.at_unix_s if earlier is not None else 0.0
    num_steps, exposed_s = growth("step_seconds_count"), growth("exposed_seconds_sum")
    step_s = growth("step_seconds_sum")
    return msgspec.structs.replace(
        known,
        running=value("open_requests", state="running"),
        waiting=value("open_requests", state="waiting"),
        urgent=value("boundary_requests", side="urgent"),
        normal=value("boundary_requests", side="normal"),
        kv_usage_fraction=value("kv_usage_fraction"),
        kv_blocks={
            f"{place} {state}": value("kv_blocks", place=place, state=state)
            for place, state in KV_STATES
        },
        offloaded_bytes=value("kv_copied_bytes_total", direction="offload"),
        onboarded_bytes=value("kv_copied_bytes_total", direction="onboard"),
        preemptions=value("preemptions_total"),
        steps=value("step_seconds_count"),
        recent_offload_bytes_per_s=_ratio(
            growth("kv_copied_bytes_total", direction="offload"), interval_s
        ),
        recent_onboard_bytes_per_s=_ratio(
            growth("kv_copied_bytes_total", direction="onboard"), interval_s
        ),
        recent_tokens_per_s=_ratio(growth("tokens_total"), interval_s),
        recent_step_ms=_ratio(1e3 * step_s, num_steps),
        recent_predicted_step_ms=_ratio(1e3 * growth("step_predicted_seconds_total"), num_steps),
        recent_exposed_share=_ratio(exposed_s, exposed_s + step_s),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
