"""What a router expects of its nodes: when prompts will have been computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

from orchestrator.core.latency import BatchLatencyModel, BatchShape
from orchestrator.wire import NodeDescription
from router.policy import EndpointView, RoutingRequest


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


class ProfileOutlook:
    """Predicts by the latency profile that each node's engine was built with.

    As in the gain estimate of GoRouting (ProServe, equations 29 and 30 of the specification), a
    request earns something where its first token is due after all prompts that wait there, and
    its own, are computed. It is an optimistic estimate: the lengths of the waiting prompts are
    not known, so the part of their cost that grows with the square of the length is left out.
    """

    def __init__(
        self,
        views: Callable[[float], Sequence[EndpointView]],
        description_of: Callable[[str], NodeDescription],
    ) -> None:
        """`views` gives the nodes that may be used at a time, `description_of` what one is."""
        self._views = views
        self._description_of = description_of
        self._model_of = cache(BatchLatencyModel)

    def can_gain(self, request: RoutingRequest, now_s: float) -> bool:
        """Return whether the first token can come in time on any node that is large enough."""
        large_enough = [
            view for view in self._views(now_s) if view.max_sequence_tokens >= request.max_size
        ]
        left_s = request.arrival_s + request.slo.ttft_s - now_s
        return not large_enough or any(
            self._first_token_s(view, request.num_prompt_tokens) < left_s for view in large_enough
        )

    def drain_s(self, now_s: float) -> float:
        """Return the seconds until the first node has no prompts left to compute."""
        return min((self._first_token_s(view, 0) for view in self._views(now_s)), default=0.0)

    def _first_token_s(self, view: EndpointView, num_prompt_tokens: int) -> float:
        """Return when a new prompt is computed if it goes behind all that wait at a node."""
        description = self._description_of(view.endpoint_id)
        num_tokens = view.num_queued_prompt_tokens + num_prompt_tokens
        num_steps = math.ceil(num_tokens / description.capabilities.max_num_batched_tokens)
        if num_steps == 0:
            return 0.0
        model = self._model_of(description.latency_profile)
        work = BatchShape(
            num_prefills=1,
            prefill_tokens=num_tokens,
            prefill_tokens_squared=num_prompt_tokens**2,
            num_decodes=num_steps * view.num_decoding,
        )
        return model.predict_s(work) + (num_steps - 1) * model.step_constant_s(has_prefill=True)
