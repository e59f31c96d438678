"""What a rule that chooses the node for a request is asked and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from orchestrator.core.slo import Slo

if TYPE_CHECKING:
    from router.fleet import Flags, Fleet


@dataclass(frozen=True, slots=True)
class RoutingRequest:
    """What a policy may know of a request."""

    request_id: str
    prompt_token_ids: Sequence[int]
    max_tokens: int
    priority_class: str
    weight: float
    slo: Slo
    arrival_s: float
    """On the clock of `pick`'s `now_s`."""

    cache_salt: str = ""
    """Only requests with the same one share KV."""

    needs_grammar: bool = False
    """Only nodes that follow a grammar can take it."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def max_size(self) -> int:
        """Prompt and output tokens at most."""
        return self.num_prompt_tokens + self.max_tokens

    @property
    def due_s(self) -> float:
        """When the first token is due, on the clock of `arrival_s`."""
        return self.arrival_s + self.slo.ttft_s


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """Where a request goes, and why."""

    endpoint_id: str | None
    """None: nowhere now."""

    expected_gain: float | None
    """Gain that the policy expects there, in weights of first tokens, what others lose already
    taken off; None if it does not estimate any."""

    reason: str
    """For logs."""

    is_satisfiable: bool | None = None
    """Whether the policy expects the first token there in time; None if it does not estimate."""


NO_NODE = RoutingDecision(None, None, "no node on offer")


class RoutingPolicy(Protocol):
    """A rule that picks one of the nodes on offer. Touches no clock and no socket: the same calls
    in the same order get the same answers."""

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        """Return the node for `request`.

        `offered` marks the rows of `fleet` that may be used now and can take the request; no
        other is picked. It may mark none.
        """
        ...
