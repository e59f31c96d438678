"""Decides which valid requests are let in when there is more work than the nodes can do.

What is let in goes to a node at once: there the scheduler orders everything that waits by what it
earns, and a queue in the router would only hide work from it. So the router bounds how many
sequences wait for their first token, keeps places for the more valuable classes and for every
client, and tells the others when to come again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from orchestrator.core.slo import GainWeights, PriorityClass
from router.client_directory import Client
from router.config import AdmissionConfig
from router.errors import TooManyRequests
from router.metrics import RouterMetrics
from router.outlook import Outlook
from router.rate_limits import Demand, Reservation, duration
from router.translation import GenerationPlan
from router.usage import UsageStore
from router.waiting_room import Place, WaitingRoom

MIN_RETRY_S = 1.0
"""Nobody is asked to come again sooner, whatever is predicted."""


class Lease:
    """What a request that was let in holds, until its answer has ended."""

    def __init__(self, reservation: Reservation, places: Sequence[Place]) -> None:
        self.places = places
        """Where each of its sequences waits for its first token."""

        self._reservation = reservation

    def close(self, *, num_used_tokens: int) -> None:
        """Give everything back but the tokens that count as used; called once."""
        for place in self.places:
            place.leave()
        self._reservation.close(num_used_tokens=num_used_tokens)


class Admission:
    """Lets requests in."""

    def __init__(
        self,
        config: AdmissionConfig,
        classes: Sequence[PriorityClass],
        outlook: Outlook,
        metrics: RouterMetrics,
        store: UsageStore,
    ) -> None:
        self._config = config
        self._outlook = outlook
        self._metrics = metrics
        self._store = store
        self._room = WaitingRoom(
            config.max_waiting_sequences,
            [c.name for c in sorted(classes, key=lambda c: -c.weight)],
            reserved_fraction=config.reserved_fraction,
            client_share=config.client_share,
            store=store,
        )

    @property
    def num_waiting(self) -> int:
        """Sequences that were let in and have no token yet."""
        return self._room.num_waiting

    def admit(
        self, plan: GenerationPlan, client: Client, now_s: float
    ) -> tuple[GenerationPlan, Lease]:
        """Return the plan to run, which may be a lesser one, and what it holds until its end.

        Raises:
            TooManyRequests: the nodes have too much to do, or the client has reached a limit.
            Refused: the client's limits are too small for the request.
        """
        num_sequences = len(plan.sequences)
        plan = self._without_hope(plan, client, now_s)
        demand = Demand(
            plan.num_prompt_tokens,
            sum(sequence.sampling.max_tokens for sequence in plan.sequences),
            num_sequences,
        )
        with self._store.exclusively():
            obstacle = self._room.obstacle(plan.node_class.name, client.name, num_sequences)
            if obstacle is None:
                reservation = client.limiter.reserve(demand, now_s)
                places = self._room.enter(client.name, num_sequences)
            else:
                share = obstacle.num_too_many / self._room.num_waiting
        if obstacle is not None:
            raise self._refusal(
                plan,
                client,
                f"{obstacle.message};",
                code=obstacle.code,
                wait_s=self._outlook.drain_s(now_s) * share,
            )
        if plan.demoted_to is not None:
            self._metrics.demotions(plan.priority_class.name).inc()
        return plan, Lease(reservation, places)

    def _without_hope(self, plan: GenerationPlan, client: Client, now_s: float) -> GenerationPlan:
        """Return the plan as the policy for hopeless requests wants it, if it is one."""
        if self._config.hopeless == "queue":
            return plan
        lengths = [len(sequence.prompt.token_ids) for sequence in plan.sequences]
        request = plan.routing_request(lengths.index(min(lengths)), request_id="")
        if self._outlook.can_gain(request, now_s):
            return plan
        if self._config.hopeless == "demote":
            least = client.terms.least_class
            is_lesser = least.name != plan.priority_class.name
            return dataclasses.replace(plan, demoted_to=least) if is_lesser else plan
        raise self._refusal(
            plan,
            client,
            f"no node can make the first token within the objective of {plan.slo.ttft_s * 1000:g} "
            "ms; ask for a longer slo.ttft_ms, or",
            code="no_gain_possible",
            wait_s=self._outlook.drain_s(now_s),
        )

    def _refusal(
        self, plan: GenerationPlan, client: Client, message: str, *, code: str, wait_s: float
    ) -> TooManyRequests:
        # What was turned away counts as missed, or refusing would look like serving well.
        missed = plan.priority_class.weight * GainWeights().of_token(0) * len(plan.sequences)
        self._metrics.of_class(plan.priority_class.name).gain_possible.inc(missed)
        if client.name is not None:
            self._metrics.of_client(client.name).gain_possible.inc(missed)
        retry_after_s = max(MIN_RETRY_S, wait_s)
        return TooManyRequests(
            f"{message} try again in {duration(retry_after_s)}",
            kind="overload",
            code=code,
            retry_after_s=retry_after_s,
        )
