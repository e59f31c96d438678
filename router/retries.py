"""When a sequence that has lost its node is sent to another one, and when it is given up.

Pure: no clock, no I/O, no chance; times are seconds on the caller's clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from orchestrator.core.backoff import backoff_s
from orchestrator.core.request import ResumePoint
from orchestrator.core.slo import Slo, token_deadline_s
from router.policy import NO_NODE, RoutingRequest

MAX_ENGINE_ERRORS = 2
"""An engine that fails ends all requests of its step, whichever was at fault: each may try another
node once. One on which a second engine fails was probably the one."""


@dataclass(frozen=True, slots=True)
class RetryRules:
    """How often, how fast and for how long."""

    max_attempts: int
    """Nodes that one sequence is sent to."""

    first_delay_s: float
    """Longest pause before the first retry; doubled for each further one without a token."""

    max_delay_s: float
    max_wait_s: float
    """Longest time that a sequence is without a node, unless its client wishes another."""

    def delay_s(self, num_failures: int, chance: float) -> float:
        """Return the pause after so many failures in a row, at least 1.

        `chance` in [0, 1) spreads the retries of many sequences that lost the same node
        (full jitter: anything from nothing to the whole pause).
        """
        return chance * backoff_s(num_failures, first_s=self.first_delay_s, max_s=self.max_delay_s)


class SequenceProgress:
    """How far one sequence has come, over all nodes that it was sent to."""

    def __init__(
        self, routing: RoutingRequest, rules: RetryRules, *, max_wait_s: float | None
    ) -> None:
        """`max_wait_s` is how long it may be without a node, late or not, by its client's wish;
        None leaves that to the rules."""
        self._routing = routing
        self._rules = rules
        self._max_wait_s = max_wait_s
        self._token_ids: list[int] = []
        self._first_token_s: float | None = None
        self._alone_since_s: float | None = routing.arrival_s
        """Since when no node works on it; None while one does."""

        self._num_engine_errors = 0
        self._is_accepted = False
        self.num_attempts = 0
        self.decision = NO_NODE
        """Of the last attempt."""

        self.num_failures = 0
        """In a row, without a token in between."""

        self.failed_instances: set[str] = set()
        """Node processes that failed on it; it never returns there."""

    @property
    def resume_point(self) -> ResumePoint | None:
        """What another node has to know; None before the first token."""
        if self._first_token_s is None:
            return None
        ttft_s = self._first_token_s - self._routing.arrival_s
        return ResumePoint(tuple(self._token_ids), ttft_s)

    @property
    def routing(self) -> RoutingRequest:
        """The request as the next node will see it: a longer prompt and fewer tokens to come, the
        next one due when it always was."""
        routing, num_tokens = self._routing, len(self._token_ids)
        if num_tokens == 0:
            return routing
        due_s = token_deadline_s(routing.slo, num_tokens, arrival_s=0.0)
        return replace(
            routing,
            prompt_token_ids=(*routing.prompt_token_ids, *self._token_ids),
            max_tokens=routing.max_tokens - num_tokens,
            slo=Slo(ttft_s=due_s, tpot_s=routing.slo.tpot_s),
        )

    def accept(self) -> None:
        """A node works on it."""
        self._is_accepted = True
        self._alone_since_s = None

    def receive(self, token_ids: Iterable[int], now_s: float) -> None:
        """Tokens are delivered; none is fine."""
        self._token_ids += token_ids
        if self._token_ids and self._first_token_s is None:
            self._first_token_s = now_s
        self.num_failures = 0

    def lose_node(self, instance_id: str, now_s: float, *, is_engine_error: bool) -> None:
        """The node that the sequence was sent to has failed on it."""
        self.failed_instances.add(instance_id)
        self._num_engine_errors += is_engine_error
        self.num_failures += 1
        if self._alone_since_s is None:
            self._alone_since_s = now_s

    def why_no_retry(self, now_s: float) -> str | None:
        """Return why the sequence is sent to no other node after a failure; None if it is."""
        if self._num_engine_errors >= MAX_ENGINE_ERRORS:
            return f"{self._num_engine_errors} engines have failed on it"
        if self.num_attempts >= self._rules.max_attempts:
            return f"it was sent to {self.num_attempts} nodes, the limit (max_attempts)"
        last_due_s = token_deadline_s(
            self._routing.slo, self._routing.max_tokens - 1, arrival_s=self._routing.arrival_s
        )
        if now_s < last_due_s or self._waited_s(now_s) <= (self._max_wait_s or 0.0):
            return None
        return "no token of it can be in time any more, and it is not to wait (any longer)"

    def why_no_wait(self, now_s: float) -> str | None:
        """Return why the sequence ends when there is no node for it now; None if it waits."""
        if self._num_engine_errors > 0:
            return "no other node can take it now"
        limit_s = self._max_wait_s
        if limit_s is None:
            if not self._is_accepted:
                # Nothing is lost: its client hears of it at once and may go elsewhere.
                return "no other node can take it now"
            limit_s = self._rules.max_wait_s
        if self._waited_s(now_s) < limit_s:
            return None
        return f"no node could take it within {limit_s:g} s"

    def _waited_s(self, now_s: float) -> float:
        return 0.0 if self._alone_since_s is None else now_s - self._alone_since_s
