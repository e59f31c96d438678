"""Chooses the node for a request. Pure: no clock, no I/O; the same inputs give the same answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.core.slo import Slo


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What a policy may know of a request."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    weight: float
    slo: Slo
    arrival_s: float
    """On the clock of `pick`'s `now_s`."""

    @property
    def max_size(self) -> int:
        """Prompt and output tokens at most."""
        return self.num_prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class EndpointView:
    """One node's load: its last snapshot, and what this router sent there since."""

    endpoint_id: str
    num_queued_prompt_tokens: int
    """Prompt tokens not yet computed."""

    num_decoding: int
    """Requests that have produced output."""

    max_sequence_tokens: int
    """Prompt and output tokens of one sequence, at most."""


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """Where a request goes, and why."""

    endpoint_id: str | None
    """None: nowhere now."""

    expected_gain: float | None
    """Gain that the policy expects there; None if it does not estimate any."""

    reason: str
    """For logs."""


class RoutingPolicy(Protocol):
    """A rule that picks one of the nodes on offer."""

    def pick(
        self, request: RoutingRequest, endpoints: Sequence[EndpointView], now_s: float
    ) -> RoutingDecision:
        """Return the node for `request`.

        `endpoints` holds only nodes that may be used now and are large enough for the request;
        it may be empty.
        """
        ...


class LeastLoadPolicy:
    """Fewest outstanding prompt tokens plus decoding requests; ties go to the smallest id.

    Source: Min-Load of the specification's section 6.2, for nodes that do both.
    """

    def pick(
        self, request: RoutingRequest, endpoints: Sequence[EndpointView], now_s: float
    ) -> RoutingDecision:
        """Return the least loaded node."""
        if not endpoints:
            return RoutingDecision(None, None, "no node on offer")
        load, endpoint_id = min(
            (e.num_queued_prompt_tokens + e.num_decoding, e.endpoint_id) for e in endpoints
        )
        return RoutingDecision(endpoint_id, None, f"least load: {load}")
