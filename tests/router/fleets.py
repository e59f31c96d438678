"""Short ways to make what tests of routing need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.core.ports import SchedulerLoad
from orchestrator.core.slo import Slo
from router.fleet import DrainOptions, EndpointSnapshot, Fleet
from router.policy import RoutingDecision, RoutingPolicy, RoutingRequest
from tests.factories import make_capabilities, make_queue_summary


def make_routing_request(
    request_id: str = "r",
    *,
    num_prompt_tokens: int = 10,
    prompt_token_ids: Sequence[int] | None = None,
    max_tokens: int = 8,
    priority_class: str = "normal",
    weight: float = 1.0,
    ttft_s: float = 1.0,
    tpot_s: float = 0.050,
    arrival_s: float = 0.0,
    cache_salt: str = "",
    needs_grammar: bool = False,
) -> RoutingRequest:
    return RoutingRequest(
        request_id=request_id,
        prompt_token_ids=(
            tuple(range(num_prompt_tokens)) if prompt_token_ids is None else prompt_token_ids
        ),
        max_tokens=max_tokens,
        priority_class=priority_class,
        weight=weight,
        slo=Slo(ttft_s=ttft_s, tpot_s=tpot_s),
        arrival_s=arrival_s,
        cache_salt=cache_salt,
        needs_grammar=needs_grammar,
    )


def make_snapshot(
    *prefills: tuple[float | None, float, float],
    num_queued_prompt_tokens: int = 0,
    num_running: int = 0,
    num_decoding: int = 0,
    num_free_device_blocks: int = 1000,
    num_device_blocks: int = 1000,
    max_model_len: int = 8192,
    grammar_obstacle: str | None = None,
    taken_at_s: float = 0.0,
    complete_until_s: float | None = None,
    instance_id: str = "first",
    **queue: Any,
) -> EndpointSnapshot:
    """Each prefill is (due in seconds, weight, seconds of work); `queue` goes to
    `make_queue_summary`."""
    return EndpointSnapshot(
        instance_id=instance_id,
        capabilities=make_capabilities(
            num_device_blocks=num_device_blocks,
            max_model_len=max_model_len,
            grammar_obstacle=grammar_obstacle,
        ),
        load=SchedulerLoad(
            num_waiting=len(prefills),
            num_running=num_running,
            num_decoding=num_decoding,
            num_queued_prompt_tokens=num_queued_prompt_tokens,
            num_free_device_blocks=num_free_device_blocks,
            num_device_blocks=num_device_blocks,
        ),
        queue=make_queue_summary(*prefills, **queue),
        taken_at_s=taken_at_s,
        complete_until_s=taken_at_s if complete_until_s is None else complete_until_s,
    )


def make_fleet(
    snapshots: Mapping[str, EndpointSnapshot], drain: DrainOptions | None = None
) -> Fleet:
    """All of them on offer for ever."""
    fleet = Fleet(snapshots, drain or DrainOptions())
    for endpoint_id, snapshot in snapshots.items():
        fleet.see(endpoint_id, snapshot)
        fleet.allow(endpoint_id, until_s=math.inf)
    return fleet


def pick(
    policy: RoutingPolicy,
    fleet: Fleet,
    request: RoutingRequest | None = None,
    *,
    now_s: float = 0.0,
    exclude: Sequence[str] = (),
) -> RoutingDecision:
    """Let a policy choose among all nodes that may be used but those in `exclude`."""
    request = request or make_routing_request(arrival_s=now_s)
    offered = fleet.offer(now_s, request.max_size)
    for endpoint_id in exclude:
        offered[fleet.row_of(endpoint_id)] = False
    return policy.pick(request, fleet, offered, now_s)
