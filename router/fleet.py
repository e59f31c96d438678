"""What a router knows of its nodes, as columns, so that a decision is a few array operations.

A node's state is its last snapshot and what this router has sent there since. Each event rewrites
the row of one node; deciding only reads. Equation numbers are those of this project's
specification:

    (28)  c_p = c0 + cost of one token of each decoding request: what one more step costs
    (29)  Load_p(U) = max(sum of T_p over U + |U| * c_p - elapsed, c_p): when U is past prefill

Elapsed time is credited for work that was there, never for the next prompt: the books hold the
moment at which the node will have drained, and a prompt that comes later starts then or now.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from orchestrator.core.ports import EngineCapabilities, QueueSummary, SchedulerLoad
from router.node_figures import NodeFigures
from router.policy import RoutingRequest

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]

_LEAST_WIDTH = 16
"""Queue entries that every row has room for; doubled when one needs more."""


@dataclass(frozen=True, slots=True)
class DrainOptions:
    """How the time in which a node gets past its queued prompts is estimated (29)."""

    steps_per_prompt: float = 1.0
    """Step constants that each queued prompt costs: 1 is one prompt per step, as in the paper; 0
    is all prompts in one step, for nodes that batch them without bound."""

    counts_hopeless: bool = True
    """Whether prompts that can no longer make their deadline are served before a new one, as the
    paper has it. Without, they are taken to wait for everybody else, as SlideBatching has it."""

    def __post_init__(self) -> None:
        if not 0 <= self.steps_per_prompt <= 1:
            raise ValueError(
                f"steps_per_prompt is {self.steps_per_prompt}, it must be between 0 and 1"
            )


@dataclass(frozen=True, slots=True)
class EndpointSnapshot:
    """What a node held at one moment, on this router's clock."""

    instance_id: str
    """The process that said it."""

    capabilities: EngineCapabilities
    load: SchedulerLoad
    queue: QueueSummary
    taken_at_s: float
    """When the node's last step ended; what the next one computes is still in the queue."""

    complete_until_s: float
    """What this router had sent before is in it."""


@dataclass(slots=True, eq=False)
class Dispatch:
    """A sequence that this router sent to a node and that has not ended. Changed by its fleet
    only."""

    endpoint_id: str
    instance_id: str
    """The process it was sent to."""

    request: RoutingRequest
    sent_at_s: float
    is_satisfiable: bool | None = None
    """Whether its policy expected the first token in time; None if it does not estimate."""

    has_first_token: bool = False


@dataclass(slots=True)
class _Endpoint:
    """One node, from which its row can be written anew."""

    snapshot: EndpointSnapshot | None = None
    entries_of: EndpointSnapshot | None = None
    """The snapshot for which the next two were made."""

    entries: list[_Entry] = field(default_factory=list)
    """The snapshot's queue."""

    num_ahead: int = 0
    """Prompts of the snapshot's queue that a new one has to wait for."""

    unseen: list[Dispatch] = field(default_factory=list)
    """Sent since the snapshot, in order."""


_Entry = tuple[float, float, float]
"""When a first token is due, its gain, and seconds of work that a new prompt has to wait for."""


_PADDING: _Entry = (-math.inf, 0.0, 0.0)


class Fleet:
    """A set of nodes, one row each, in the order of their ids.

    Policies only read what is here. Rows of nodes that nothing is known of hold zeros and are
    never offered. A node that comes or goes moves the rows behind it, so rows, and arrays that
    were read before, are good until then.
    """

    def __init__(self, endpoint_ids: Iterable[str], drain: DrainOptions = DrainOptions()) -> None:
        self.endpoint_ids = tuple(sorted(endpoint_ids))
        self._drain = drain
        self._row_of = {endpoint_id: row for row, endpoint_id in enumerate(self.endpoint_ids)}
        self._endpoints = [_Endpoint() for _ in self.endpoint_ids]
        self._usable_until_s = np.full(len(self), -math.inf)
        self._stale_rows: set[int] = set()
        """Rows to write anew before somebody reads: several things may happen to a node between
        two decisions, and to most nodes of a large fleet nothing that matters to any."""

        self._data: Floats = np.zeros((len(NodeFigures._fields), len(self)))
        self._figures: NodeFigures[Floats] = NodeFigures(*self._data)
        self._due_s: Floats
        self._weight: Floats
        self._work_s: Floats
        self._make_queues(_LEAST_WIDTH)

    def __len__(self) -> int:
        return len(self.endpoint_ids)

    @property
    def figures(self) -> NodeFigures[Floats]:
        """Arrays of (num_endpoints,), as things are now: later changes may show in them or not."""
        self._write_stale_rows()
        return self._figures

    @property
    def due_s(self) -> Floats:
        """When the entries of each node's queue are due, (num_endpoints, width), then -inf."""
        self._write_stale_rows()
        return self._due_s

    @property
    def weight(self) -> Floats:
        """The gain of each entry, likewise, then 0."""
        self._write_stale_rows()
        return self._weight

    @property
    def work_s(self) -> Floats:
        """The work of each entry, likewise, then 0."""
        self._write_stale_rows()
        return self._work_s

    def row_of(self, endpoint_id: str) -> int:
        """Return a node's row."""
        return self._row_of[endpoint_id]

    def add(self, endpoint_id: str) -> None:
        """Give a new node a row; nothing is known of it yet."""
        assert endpoint_id not in self._row_of, "each node has one row"
        self._write_stale_rows()
        row = bisect_left(self.endpoint_ids, endpoint_id)
        ids = self.endpoint_ids
        self._endpoints.insert(row, _Endpoint())
        self._move_rows(
            (*ids[:row], endpoint_id, *ids[row:]),
            lambda array, padding, axis: np.insert(array, row, padding, axis=axis),
        )

    def remove(self, endpoint_id: str) -> None:
        """Forget a node. Dispatches there that have not ended count nowhere any more."""
        self._write_stale_rows()
        row = self._row_of[endpoint_id]
        ids = self.endpoint_ids
        del self._endpoints[row]
        self._move_rows(
            (*ids[:row], *ids[row + 1 :]),
            lambda array, _, axis: np.delete(array, row, axis=axis),
        )

    def allow(self, endpoint_id: str, until_s: float) -> None:
        """Offer a node up to that moment, and at it; -inf takes it out."""
        self._usable_until_s[self._row_of[endpoint_id]] = until_s

    def offer(
        self,
        now_s: float,
        num_tokens: int,
        exclude: Collection[str] = (),
        *,
        needs_grammar: bool = False,
    ) -> Flags:
        """Return which nodes may be used now for a sequence of so many tokens, without the
        processes (`instance_id`) in `exclude`; with `needs_grammar`, only those that follow one.
        """
        offered: Flags = self._usable_until_s >= now_s
        offered &= self.figures.max_sequence_tokens >= num_tokens
        if needs_grammar:
            offered &= self.figures.follows_grammars > 0
        if exclude:
            for row, endpoint in enumerate(self._endpoints):
                if endpoint.snapshot is not None and endpoint.snapshot.instance_id in exclude:
                    offered[row] = False
        return offered

    def see(self, endpoint_id: str, snapshot: EndpointSnapshot) -> None:
        """Take in a snapshot of a node, not older than the one before."""
        row = self._row_of[endpoint_id]
        endpoint = self._endpoints[row]
        endpoint.snapshot = snapshot
        endpoint.unseen = [
            dispatch
            for dispatch in endpoint.unseen
            if dispatch.sent_at_s >= snapshot.complete_until_s
            and dispatch.instance_id == snapshot.instance_id
        ]
        self._stale_rows.add(row)

    def begin_dispatch(
        self,
        endpoint_id: str,
        request: RoutingRequest,
        now_s: float,
        *,
        is_satisfiable: bool | None = None,
    ) -> Dispatch:
        """Count a sequence on a node until `end_dispatch`; its snapshots may not show it yet."""
        row = self._row_of[endpoint_id]
        snapshot = self._endpoints[row].snapshot
        assert snapshot is not None, "only nodes that are known are on offer"
        dispatch = Dispatch(endpoint_id, snapshot.instance_id, request, now_s, is_satisfiable)
        self._endpoints[row].unseen.append(dispatch)
        self._stale_rows.add(row)
        return dispatch

    def note_first_token(self, dispatch: Dispatch) -> None:
        """A sequence has produced output."""
        dispatch.has_first_token = True
        row = self._row_with(dispatch)
        if row is not None:
            self._stale_rows.add(row)

    def end_dispatch(self, dispatch: Dispatch) -> None:
        """A sequence has ended, however."""
        row = self._row_with(dispatch)
        if row is not None:
            self._endpoints[row].unseen.remove(dispatch)
            self._stale_rows.add(row)

    def prefill_s(self, num_tokens: int, num_cached: Floats | None = None) -> Floats:
        """Return what a prompt costs each node (10), which has KV of its first `num_cached`."""
        figures = self.figures
        if num_cached is None:
            return num_tokens * (num_tokens * figures.prefill_quadratic_s + figures.prefill_token_s)
        num_new = num_tokens - num_cached
        token_s = num_new * figures.prefill_quadratic_s + num_cached * figures.prefill_context_s
        return num_new * (token_s + figures.prefill_token_s) + num_cached * figures.prefill_cached_s

    def loads_s(self, prefill_s: Floats, now_s: float) -> tuple[Floats, Floats]:
        """Return when each node is past its queue (29), from now: as it is, and with one more
        prompt that costs `prefill_s`."""
        step_s = self.figures.step_s
        left_s = self.figures.drained_at_s - now_s
        load_s = np.maximum(left_s, step_s)
        left_s += self._drain.steps_per_prompt * step_s
        return load_s, np.maximum(left_s, step_s) + prefill_s

    def work_left_s(self, now_s: float) -> Floats:
        """Return what is left of each node's queue, (num_endpoints, width), in seconds: the work
        of each entry and of those before it."""
        done_s = np.cumsum(self.work_s, axis=1)
        # Nobody has done more since than there was to do.
        elapsed_s = np.minimum(now_s - self.figures.began_at_s, done_s[:, -1])
        return done_s - elapsed_s[:, None]

    def _row_with(self, dispatch: Dispatch) -> int | None:
        """Return the row that counts a dispatch; None once a snapshot does, or its node is gone."""
        row = self._row_of.get(dispatch.endpoint_id)
        return row if row is not None and dispatch in self._endpoints[row].unseen else None

    def _queue_of(self, snapshot: EndpointSnapshot) -> tuple[list[_Entry], int]:
        """Return a snapshot's queue by deadline, and how many prompts are ahead of a new one."""
        queue, now_s = snapshot.queue, snapshot.taken_at_s
        step_s = queue.latency_profile.mixed_step_s
        entries: list[_Entry] = []
        num_ahead = 0
        for due_in_s, weight, work_s, num in zip(
            queue.due_in_s, queue.weight, queue.work_s, queue.num_prefills, strict=True
        ):
            due_s = now_s + _or_inf(due_in_s)
            is_ahead = self._drain.counts_hopeless or due_s > now_s + work_s / num + step_s
            entries.append((due_s, weight, work_s if is_ahead else 0.0))
            num_ahead += num if is_ahead else 0
        return entries, num_ahead

    def _write_stale_rows(self) -> None:
        if self._stale_rows:
            for row in self._stale_rows:
                self._write(row)
            self._stale_rows.clear()

    def _write(self, row: int) -> None:
        """Write a node's row from its snapshot and what was sent since."""
        endpoint = self._endpoints[row]
        snapshot = endpoint.snapshot
        if snapshot is None:
            return
        if endpoint.entries_of is not snapshot:
            endpoint.entries_of = snapshot
            endpoint.entries, endpoint.num_ahead = self._queue_of(snapshot)
        load, queue, capabilities = snapshot.load, snapshot.queue, snapshot.capabilities
        profile = queue.latency_profile
        decoding = [d.request for d in endpoint.unseen if d.has_first_token]
        queued = [d for d in endpoint.unseen if not d.has_first_token]
        num_decoding = load.num_decoding + len(decoding)
        decode_context = queue.decode_context_tokens + sum(r.num_prompt_tokens for r in decoding)
        decode_s = num_decoding * profile.decode_token_s + decode_context * profile.decode_context_s
        step_s = profile.mixed_step_s + decode_s
        entries, began_at_s, drained_at_s = self._with_unseen(endpoint, snapshot, queued, step_s)
        self._data[:, row] = NodeFigures(
            max_sequence_tokens=max_sequence_tokens(capabilities),
            follows_grammars=float(capabilities.grammar_obstacle is None),
            num_requests=load.num_waiting + load.num_running + len(endpoint.unseen),
            num_running=load.num_running + len(decoding),
            num_decoding=num_decoding,
            num_queued_tokens=load.num_queued_prompt_tokens
            + sum(d.request.num_prompt_tokens for d in queued),
            num_free_blocks=load.num_free_device_blocks,
            num_blocks=load.num_device_blocks,
            block_size_tokens=capabilities.block_size_tokens,
            max_weight=max([queue.max_weight, *(d.request.weight for d in endpoint.unseen)]),
            prefill_quadratic_s=profile.prefill_quadratic_s,
            prefill_context_s=profile.prefill_context_s,
            prefill_token_s=profile.prefill_token_s,
            prefill_cached_s=profile.prefill_cached_s,
            decode_context_s=profile.decode_context_s,
            decode_token_s=profile.decode_token_s,
            step_s=step_s,
            decode_step_s=profile.decode_step_s + decode_s,
            began_at_s=began_at_s,
            drained_at_s=drained_at_s,
            latency_budget_s=_or_inf(queue.latency_budget_s),
            decode_weight=queue.decode_weight + sum(r.weight for r in decoding),
            min_decode_tpot_s=min(
                [_or_inf(queue.min_decode_tpot_s), *(r.slo.tpot_s for r in decoding)]
            ),
        )
        self._write_queue(row, entries)

    def _with_unseen(
        self,
        endpoint: _Endpoint,
        snapshot: EndpointSnapshot,
        queued: Sequence[Dispatch],
        step_s: float,
    ) -> tuple[list[_Entry], float, float]:
        """Return a node's queue by deadline, since when it works on it, and when it has drained."""
        extra_s = self._drain.steps_per_prompt * step_s
        entries = list(endpoint.entries)
        profile = snapshot.queue.latency_profile
        began_at_s = drained_at_s = -math.inf
        if endpoint.num_ahead:
            began_at_s = snapshot.taken_at_s
            work_s = sum(entry[2] for entry in entries)
            drained_at_s = began_at_s + work_s + step_s + extra_s * (endpoint.num_ahead - 1)
        for dispatch in queued:
            request = dispatch.request
            work_s = profile.prefill_s(request.num_prompt_tokens, 0)
            is_hopeless = request.due_s <= dispatch.sent_at_s + work_s + profile.mixed_step_s
            if is_hopeless and not self._drain.counts_hopeless:
                insort(entries, (request.due_s, request.weight, 0.0))
                continue
            if began_at_s == -math.inf:
                began_at_s = dispatch.sent_at_s
            drained_at_s = max(drained_at_s + extra_s, dispatch.sent_at_s + step_s) + work_s
            insort(entries, (request.due_s, request.weight, work_s))
        return entries, began_at_s, drained_at_s

    def _write_queue(self, row: int, entries: Sequence[_Entry]) -> None:
        width, num_entries = self._due_s.shape[1], len(entries)
        if num_entries > width:
            before = self._due_s, self._weight, self._work_s
            self._make_queues(max(2 * width, num_entries))
            for matrix, old in zip((self._due_s, self._weight, self._work_s), before, strict=True):
                matrix[:, :width] = old
        columns = np.array(entries).T if entries else np.empty((3, 0))
        for matrix, column, padding in zip(
            (self._due_s, self._weight, self._work_s), columns, _PADDING, strict=True
        ):
            matrix[row, :num_entries] = column
            matrix[row, num_entries:] = padding

    def _move_rows(
        self, endpoint_ids: tuple[str, ...], change: Callable[[Floats, float, int], Floats]
    ) -> None:
        """Have other nodes from now on; `change` makes the new form of an array, whose rows are
        along an axis and begin as a padding."""
        self.endpoint_ids = endpoint_ids
        self._row_of = {endpoint_id: row for row, endpoint_id in enumerate(endpoint_ids)}
        self._usable_until_s = change(self._usable_until_s, -math.inf, 0)
        self._data = change(self._data, 0.0, 1)
        self._figures = NodeFigures(*self._data)
        before = (self._due_s, self._weight, self._work_s)
        queues = (change(m, p, 0) for m, p in zip(before, _PADDING, strict=True))
        self._due_s, self._weight, self._work_s = queues

    def _make_queues(self, width: int) -> None:
        """Make empty queue matrices, (num_endpoints, width): entries by deadline, then padding."""
        shape = (len(self), width)
        self._due_s, self._weight, self._work_s = (np.full(shape, padding) for padding in _PADDING)


def max_sequence_tokens(capabilities: EngineCapabilities) -> int:
    """Return how many prompt and output tokens one sequence of a node may have."""
    # The last token is delivered but never computed, so it needs no KV.
    num_kv_tokens = capabilities.num_device_blocks * capabilities.block_size_tokens + 1
    return min(capabilities.max_model_len, num_kv_tokens)


def least_row(values: Floats, flags: Flags) -> int:
    """Return the row of the least value among those marked; the first of equals."""
    return int(np.where(flags, values, math.inf).argmin())


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value
