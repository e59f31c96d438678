"""What a router expects of its nodes: when prompts will have been computed."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from router.fleet import Flags, Fleet, Floats
from router.policy import RoutingRequest


class Outlook(Protocol):
    """Predicts what becomes of work on the nodes that may be used now."""

    def can_gain(self, request: RoutingRequest, now_s: float) -> bool:
        """Return whether `request` can still earn anything on any node; True if there is none,
        for then it is not the load that is in the way."""
        ...

    def drain_s(self, now_s: float) -> float:
        """Return the seconds until the first node has computed what waits there now; 0 if there
        is none."""
        ...


class Offer(Protocol):
    """`EndpointPool.offer`, as far as it is used here."""

    def __call__(self, now_s: float, num_tokens: int, *, needs_grammar: bool = False) -> Flags:
        """Return the rows of a fleet that may be used at a time for a request."""
        ...


class FleetOutlook:
    """Predicts by what the fleet knows of each node's queue and latencies.

    As in the gain estimate of GoRouting (ProServe, equations 29 and 30 of the specification), a
    request earns something where its first token is due after all prompts that wait there, and
    its own, are computed. Unlike a policy, which ranks nodes, this turns requests away, so it is
    optimistic: all that waits is taken to fit into one step.
    """

    def __init__(self, fleet: Fleet, offer: Offer) -> None:
        """`offer` gives the rows of `fleet` that may be used at a time for a request."""
        self._fleet = fleet
        self._offer = offer

    def can_gain(self, request: RoutingRequest, now_s: float) -> bool:
        """Return whether the first token can come in time on any node that can take the request."""
        offered = self._offer(now_s, request.max_size, needs_grammar=request.needs_grammar)
        own_s = self._fleet.prefill_s(request.num_prompt_tokens)
        first_token_s = self._queue_s(now_s) + own_s + self._fleet.figures.step_s
        is_in_time = first_token_s < request.due_s - now_s
        return not offered.any() or bool(is_in_time[offered].any())

    def drain_s(self, now_s: float) -> float:
        """Return the seconds until the first node has no prompts left to compute."""
        offered = self._offer(now_s, 0)
        if not offered.any():
            return 0.0
        queue_s = self._queue_s(now_s)
        drain_s = np.where(queue_s > 0, queue_s + self._fleet.figures.step_s, 0.0)
        return float(drain_s[offered].min())

    def _queue_s(self, now_s: float) -> Floats:
        """Return the work that waits at each node."""
        return np.maximum(self._fleet.work_left_s(now_s)[:, -1], 0.0)
