"""Replays a workload on a cluster in virtual time.

Nodes are real schedulers over simulated engines, the router is a real policy over snapshots that
are as old as a live router's. Three things happen, each at its moment: a request arrives and is
routed, a node's step ends and its next one begins, the router looks at all nodes. What happens at
the same moment happens in that order, nodes in the order of their index; so equal inputs give
equal results to the last bit.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engines.simulated import SimulatedEngine
from orchestrator.core.errors import RequestRejected
from orchestrator.core.gain import Outcome, RequestRecord
from orchestrator.core.kv_transfer import TransferDirection
from orchestrator.core.ports import Scheduler, SchedulerOutput, StepOutput
from orchestrator.simulation.workload import Workload, request_id
from router.fleet import Dispatch, DrainOptions, EndpointSnapshot, Fleet
from router.policy import RoutingPolicy, RoutingRequest

TIMELINE_BIN_S = 1.0
"""Resolution of the timeline."""


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What surrounds the nodes."""

    snapshot_interval_s: float = 0.1
    """Between two snapshots of a node; a live node streams them about as often."""

    drain: DrainOptions = DrainOptions()
    """How the router estimates loads."""

    max_drain_s: float = math.inf
    """After the last arrival; requests that have not ended by then are unfinished."""


@dataclass(slots=True)
class TimelineBin:
    """Sums over the steps of all nodes that began in one bin of time."""

    num_steps: int = 0
    num_urgent: int = 0
    num_normal: int = 0
    latency_budget_s: float = 0.0
    """Only of steps with a finite one."""


@dataclass(slots=True)
class CopyTotals:
    """What moved between device and host, over all nodes."""

    num_offloaded_blocks: int = 0
    num_onboarded_blocks: int = 0
    num_recomputed_tokens: int = 0
    """Tokens computed again because their KV was lost."""

    exposed_s: float = 0.0
    """Time in which steps waited for copies."""

    def add(self, plan: SchedulerOutput, output: StepOutput) -> None:
        """Count a step."""
        for transfer in plan.transfers:
            num_blocks = len(transfer.device_block_ids)
            if transfer.direction is TransferDirection.ONBOARD:
                self.num_onboarded_blocks += num_blocks
            else:
                self.num_offloaded_blocks += num_blocks
        self.num_recomputed_tokens += plan.reasons.num_recomputed_tokens
        self.exposed_s += output.copies.exposed_s


@dataclass(frozen=True, slots=True)
class Replay:
    """What happened."""

    records: tuple[RequestRecord, ...]
    """One per request of the workload, in order of arrival."""

    end_s: float
    """When the last step ended."""

    num_steps: int
    num_preemptions: int
    num_computed_tokens: int
    """Tokens put through the model; tokens computed again after a preemption count again."""

    copies: CopyTotals
    busy_fraction: float
    """Share of the nodes' time from 0 to `end_s` in which a step ran."""

    predictions: dict[tuple[bool, bool], int]
    """(the router expected the first token in time, it came in time) -> such requests."""

    timeline: dict[int, TimelineBin]
    """Index of the bin (its start divided by TIMELINE_BIN_S) -> what happened in it."""


@dataclass(slots=True, eq=False)
class Node:
    """One node of the cluster and the step it is in."""

    endpoint_id: str
    scheduler: Scheduler
    engine: SimulatedEngine
    plan: SchedulerOutput | None = None
    """None while idle."""

    output: StepOutput | None = None
    step_began_s: float = 0.0
    """When the step began that it is in."""


def replay(
    workload: Workload,
    make_node: Callable[[int], Node],
    *,
    num_nodes: int,
    policy: RoutingPolicy,
    options: ReplayOptions = ReplayOptions(),
) -> Replay:
    """Run the workload on `num_nodes` new nodes to its end and return what happened.

    `make_node(index)` is called once per node.
    """
    nodes = [make_node(index) for index in range(num_nodes)]
    cluster = _Cluster(workload, nodes, policy, options)
    cluster.run()
    return cluster.result()


class _Cluster:
    """The state of one replay."""

    def __init__(
        self,
        workload: Workload,
        nodes: Sequence[Node],
        policy: RoutingPolicy,
        options: ReplayOptions,
    ) -> None:
        self._workload = workload
        self._nodes = nodes
        self._fleet = Fleet((node.endpoint_id for node in nodes), options.drain)
        self._dispatches: dict[int, Dispatch] = {}
        """By the number of the request."""

        self._index_of = {node.endpoint_id: index for index, node in enumerate(nodes)}
        self._policy = policy
        self._options = options
        self._arrivals_s = workload.trace.arrival_s.tolist()
        self._step_ends: list[tuple[float, int]] = []
        """Heap of (when, node index)."""

        self._token_times_s: list[list[float]] = [[] for _ in range(len(workload))]
        self._outcomes = [Outcome.UNFINISHED] * len(workload)
        self._timeline: dict[int, TimelineBin] = {}
        self._num_preemptions = 0
        self._copies = CopyTotals()
        self._predictions: Counter[tuple[bool, bool]] = Counter()
        self._end_s = 0.0

    def run(self) -> None:
        """Let everything happen."""
        num_arrived = 0
        num_requests = len(self._arrivals_s)
        last_s = self._arrivals_s[-1] + self._options.max_drain_s
        next_look_s = self._options.snapshot_interval_s
        for node in self._nodes:
            self._fleet.allow(node.endpoint_id, until_s=math.inf)
            self._look(node, 0.0)
        while num_arrived < num_requests or self._step_ends:
            arrival_s = self._arrivals_s[num_arrived] if num_arrived < num_requests else math.inf
            step_end_s = self._step_ends[0][0] if self._step_ends else math.inf
            # Nobody is routed after the last arrival, so nobody needs to look.
            look_s = next_look_s if num_arrived < num_requests else math.inf
            if arrival_s <= step_end_s and arrival_s <= look_s:
                self._arrive(num_arrived, arrival_s)
                num_arrived += 1
            elif step_end_s <= look_s:
                if step_end_s > last_s:
                    break
                _, index = heapq.heappop(self._step_ends)
                self._end_step(index, step_end_s)
            else:
                for node in self._nodes:
                    self._look(node, look_s)
                next_look_s += self._options.snapshot_interval_s

    def result(self) -> Replay:
        """Return what has happened so far."""
        engines = [node.engine for node in self._nodes]
        busy_s = sum(engine.busy_s for engine in engines)
        node_s = self._end_s * len(engines)
        return Replay(
            records=tuple(self._record(index) for index in range(len(self._workload))),
            end_s=self._end_s,
            num_steps=sum(engine.num_steps for engine in engines),
            num_preemptions=self._num_preemptions,
            num_computed_tokens=sum(engine.num_computed_tokens for engine in engines),
            copies=self._copies,
            predictions=dict(self._predictions),
            busy_fraction=min(1.0, busy_s / node_s) if node_s > 0 else 0.0,
            timeline=self._timeline,
        )

    def _look(self, node: Node, now_s: float) -> None:
        """Let the router have a snapshot: what the scheduler said when the node's last step ended,
        and what has arrived since."""
        taken_at_s = now_s if node.plan is None else node.step_began_s
        snapshot = EndpointSnapshot(
            instance_id=node.endpoint_id,
            capabilities=node.engine.capabilities,
            load=node.scheduler.load(),
            queue=node.scheduler.queue_summary(taken_at_s),
            taken_at_s=taken_at_s,
            complete_until_s=math.nextafter(now_s, math.inf),  # with what was sent at `now_s`
        )
        self._fleet.see(node.endpoint_id, snapshot)

    def _arrive(self, index: int, now_s: float) -> None:
        request = self._workload.request(index)
        spec = request.spec
        routing = RoutingRequest(
            request_id=spec.request_id,
            prompt_token_ids=spec.prompt_token_ids,
            max_tokens=spec.sampling.max_tokens,
            priority_class=spec.priority_class,
            weight=spec.weight,
            slo=spec.slo,
            arrival_s=now_s,
            cache_salt=spec.cache_salt,
        )
        offered = self._fleet.offer(now_s, routing.max_size)
        decision = self._policy.pick(routing, self._fleet, offered, now_s)
        if decision.endpoint_id is None:
            self._outcomes[index] = Outcome.REJECTED
            return
        node_index = self._index_of[decision.endpoint_id]
        node = self._nodes[node_index]
        try:
            node.scheduler.add_request(request)
        except RequestRejected:
            self._outcomes[index] = Outcome.REJECTED
            return
        dispatch = self._fleet.begin_dispatch(
            node.endpoint_id, routing, now_s, is_satisfiable=decision.is_satisfiable
        )
        self._dispatches[index] = dispatch
        if node.plan is None:
            self._begin_step(node_index, now_s)

    def _begin_step(self, index: int, now_s: float) -> None:
        node = self._nodes[index]
        plan = node.scheduler.schedule(now_s)
        output = node.engine.step(plan)
        node.plan, node.output, node.step_began_s = plan, output, now_s
        heapq.heappush(self._step_ends, (now_s + output.step_s, index))
        self._num_preemptions += len(plan.preempted_ids)
        self._copies.add(plan, output)
        reasons = plan.reasons
        bin_index = int(now_s / TIMELINE_BIN_S)
        step_bin = self._timeline.get(bin_index)
        if step_bin is None:
            step_bin = self._timeline[bin_index] = TimelineBin()
        step_bin.num_steps += 1
        step_bin.num_urgent += reasons.num_urgent
        step_bin.num_normal += reasons.num_normal
        if reasons.latency_budget_s < math.inf:
            step_bin.latency_budget_s += reasons.latency_budget_s

    def _end_step(self, index: int, now_s: float) -> None:
        node = self._nodes[index]
        assert node.plan is not None
        assert node.output is not None
        events = node.scheduler.update_from_output(node.plan, node.output, now_s)
        for event in events:
            request_index = int(event.request_id)
            times_s = self._token_times_s[request_index]
            if event.new_token_ids:
                if not times_s:
                    self._note_first_token(self._dispatches[request_index], now_s)
                times_s.extend([now_s] * len(event.new_token_ids))
            if event.finish_reason is not None:
                self._fleet.end_dispatch(self._dispatches.pop(request_index))
                self._outcomes[request_index] = self._outcome(request_index, event.error)
        self._end_s = now_s
        if node.scheduler.has_requests:
            self._begin_step(index, now_s)
        else:
            node.plan = node.output = None

    def _note_first_token(self, dispatch: Dispatch, now_s: float) -> None:
        self._fleet.note_first_token(dispatch)
        if dispatch.is_satisfiable is not None:
            self._predictions[dispatch.is_satisfiable, now_s < dispatch.request.due_s] += 1

    def _outcome(self, index: int, error: str | None) -> Outcome:
        assert error is not None or (
            len(self._token_times_s[index]) == self._workload.trace.num_output_tokens[index]
        ), f"request {index} ended without all its tokens"
        return Outcome.FINISHED if error is None else Outcome.FAILED

    def _record(self, index: int) -> RequestRecord:
        priority_class = self._workload.class_of(index)
        return RequestRecord(
            request_id=request_id(index),
            arrival_s=self._arrivals_s[index],
            slo=priority_class.slo,
            weight=priority_class.weight,
            priority_class=priority_class.name,
            client=self._workload.trace.clients[index],
            num_expected_tokens=int(self._workload.trace.num_output_tokens[index]),
            token_times_s=self._token_times_s[index],
            outcome=self._outcomes[index],
        )
