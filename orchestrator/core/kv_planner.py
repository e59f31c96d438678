"""Decides, while a step is filled, who gets KV blocks, who loses them, and what is copied.

Source: ProServe (arXiv 2512.12928), section on block management; equation and open-choice (OC)
numbers are those of this project's specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from orchestrator.core.copy_budget import CopyModel, ReloadCandidate, copy_budget
from orchestrator.core.kv_cache import KVCacheManager
from orchestrator.core.kv_options import KVCacheOptions, KVOffload
from orchestrator.core.kv_state import Restorable
from orchestrator.core.kv_transfer import CopyProfile, KVTransfer, TransferDirection
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import EngineCapabilities
from orchestrator.core.ranking import Position, RankOrder
from orchestrator.core.request import Request, RequestStatus
from orchestrator.core.request_table import Floats, Indices, RequestTable

_NOTHING = Restorable(())
_LITTLE_USE, _MUCH_USE = 0.6, 0.9
"""Shares of device memory in use below which all requests are offloaded alike, and above which
everything is offloaded twice as early (equation 26)."""

Claim = tuple[tuple[float, ...], float, str]


@dataclass(frozen=True, slots=True)
class Claims:
    """A scheduler's rules about who takes blocks from whom."""

    of: Callable[[Request], Claim]
    """How strong a request's claim to blocks is; lower is stronger."""

    may_claim: Callable[[Request, float], bool]
    """Whether a request may take others' blocks at all at a time."""


@dataclass(slots=True)
class KVStep:
    """What happened to KV blocks while one step was filled."""

    preempted_ids: set[str] = field(default_factory=set)
    transfers: list[KVTransfer] = field(default_factory=list)
    copy_budget_blocks: int | None = None
    """Blocks that may be reloaded; None until somebody asked."""

    num_reloaded_blocks: int = 0
    num_prefix_tokens: int = 0
    """Tokens that did not have to be computed, because others had computed them."""

    num_kept_tokens: int = 0
    """Tokens of preempted requests that did not have to be computed again."""

    num_recomputed_tokens: int = 0
    """Tokens of this step that were computed before and lost."""

    is_waiting: bool = False
    """Somebody was passed over who will have room when copies end."""


class KVPlanner:
    """The KV blocks of one scheduler."""

    def __init__(
        self,
        capabilities: EngineCapabilities,
        table: RequestTable,
        model: BatchLatencyModel,
        *,
        options: KVCacheOptions,
        copies: CopyProfile | None,
        claims: Claims,
    ) -> None:
        """Without `copies`, host blocks and an option that says so, nothing is ever copied."""
        has_copies = options.offload is not KVOffload.NEVER and capabilities.num_host_blocks > 0
        self._copies: CopyModel | None = None
        if has_copies and copies is not None:
            self._copies = CopyModel(copies, num_layer_groups=capabilities.num_layer_groups)
        self.kv = KVCacheManager(
            num_device_blocks=capabilities.num_device_blocks,
            block_size_tokens=capabilities.block_size_tokens,
            num_host_blocks=capabilities.num_host_blocks if self._copies else 0,
            enable_prefix_caching=options.prefix_caching,
        )
        self._reserves_prompts = capabilities.reserves_prompts
        self._table = table
        self._model = model
        self._options = options
        self._claims = claims
        self._restorable_ids: set[str] = set()
        """Requests that lost blocks and are not computing again yet."""

        self._order = RankOrder(table, np.zeros(0), np.zeros(0))
        self._now_s = 0.0
        self._budget_s = 0.0
        self._holders_from_tail: list[tuple[int, Position, Claim]] | None = None
        self.step = KVStep()

    @property
    def is_synchronous(self) -> bool:
        """True if steps wait for the copies they start."""
        return self._options.offload is KVOffload.SYNCHRONOUS

    def begin_step(self, order: RankOrder, now_s: float, budget_s: float) -> None:
        """Begin to fill a step that may take this long."""
        self._order, self._now_s, self._budget_s = order, now_s, budget_s
        self._holders_from_tail = None
        self.step = KVStep()

    def blocks(self, row: int, num_tokens: int, restored: Restorable = _NOTHING) -> (
        Sequence[int] | None
    ):  # fmt: skip
        """Return the blocks of a request for `num_tokens` tokens in all, or None.

        `restored` blocks come from where they are kept. Preempts as many requests ranked after
        it as needed; none if preempting all that may be would not be enough.
        """
        request = self._table.requests[row]
        num_missing = self.num_missing_blocks(row, num_tokens)
        if num_missing == 0:
            return self.kv.block_ids(request.spec.request_id)
        if not restored.num_blocks:
            return self.allocate(row, num_tokens) if self._make_room(row, num_missing) else None
        num_new = num_missing - restored.num_blocks
        # Blocks shared with whoever is preempted are taken from the available ones after that.
        while (
            num_needed := num_new + self.kv.num_blocks_taken_by(request, restored)
        ) > self.kv.num_free_device_blocks:
            if not self._make_room(row, num_needed):
                return None
        # Room may have been made at the cost of what was to be restored.
        if self.kv.restorable(request).is_on_host[: restored.num_blocks] != restored.is_on_host:
            return None
        self._adopt(row, restored)
        return self.allocate(row, num_tokens)

    def allocate(self, row: int, num_tokens: int) -> Sequence[int]:
        """Return the blocks of a request for `num_tokens` tokens in all; there is room."""
        request = self._table.requests[row]
        block_ids = self.kv.allocate(request.request_id, self._num_held(request, num_tokens))
        assert block_ids is not None, "room was made before"
        self._table.num_blocks[row] = len(block_ids)
        return block_ids

    def num_missing_blocks(self, row: int, num_tokens: int) -> int:
        """Return how many more blocks a request needs to compute its first `num_tokens` tokens."""
        request = self._table.requests[row]
        return self.kv.num_missing_blocks(
            request.spec.request_id, self._num_held(request, num_tokens)
        )

    def _num_held(self, request: Request, num_tokens: int) -> int:
        return max(num_tokens, request.num_tokens) if self._reserves_prompts else num_tokens

    def restorable(self, row: int) -> Restorable | None:
        """Return what of a request's KV can be had in this step without computing it; None if
        there is no room for what was kept of it."""
        if not self.kv.has_keys:
            return _NOTHING
        request = self._table.requests[row]
        if self._table.num_blocks[row] and request.request_id not in self._restorable_ids:
            return _NOTHING
        # Looking for hundreds of blocks is dear; nobody looks who has no room for them.
        if (num_expected := self._table.num_restorable_tokens[row]) and self._victims(
            row, int(num_expected) // self.kv.block_size_tokens + 1
        ) is None:
            return None
        everything = self.kv.restorable(request)
        self._note_restorable(row, everything)
        if not everything.num_host_blocks:
            return everything
        return everything.up_to(self._num_reloads_left())

    def is_parked(self, row: int, restored: Restorable, num_ranked_before: int) -> bool:
        """Return whether a request should wait for the rest of its KV rather than compute it
        again (OC-19)."""
        request = self._table.requests[row]
        num_wanted = self._table.num_restorable_tokens[row] / self.kv.block_size_tokens
        is_first = num_ranked_before < self._options.parked_rank_fraction * len(self._table)
        return restored.num_blocks < num_wanted and request.is_decoding and not is_first

    def park(self, row: int, restored: Restorable) -> None:
        """Bring back a part of a request's KV, if there is room, without computing on it."""
        request = self._table.requests[row]
        num_tokens = request.num_computed_tokens
        num_tokens += restored.num_blocks * self.kv.block_size_tokens
        if restored.num_blocks and self.blocks(row, num_tokens, restored) is not None:
            request.status = RequestStatus.RUNNING
            self._table.refresh(request)

    def stall_s(self, restored: Restorable) -> float:
        """Return by how much a step is delayed if this is restored in it too, as far as the plan
        reckons with copies."""
        if self._copies is None or not self._options.copy_budget or not restored.num_host_blocks:
            return 0.0
        num_before = self.step.num_reloaded_blocks
        after_s = self._copies.stall_s(num_before + restored.num_host_blocks)
        return after_s - self._copies.stall_s(num_before)

    def note_scheduled(self, request: Request, num_new_tokens: int) -> None:
        """Learn that a request computes: what it has not got back by now is computed again."""
        if request.request_id in self._restorable_ids:
            self._restorable_ids.discard(request.request_id)
            self._table.num_restorable_tokens[self._table.row_of(request.request_id)] = 0
        num_again = request.num_lost_tokens - request.num_computed_tokens
        self.step.num_recomputed_tokens += max(0, min(num_again, num_new_tokens))

    def preempt(self, request: Request) -> None:
        """Take all KV from a request; what is not kept will be computed again."""
        if self._copies is not None:
            backlog = self._copies.max_offload_blocks(self._options.max_offload_backlog_s)
            transfer = self.kv.spill(request, max(0, backlog - self.kv.num_leaving_blocks))
            if transfer is not None:
                self.step.transfers.append(transfer)
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self._lose(request)
        self.step.preempted_ids.add(request.request_id)

    def offload_ahead(self, step_s: float, scheduled_ids: Iterable[str]) -> None:
        """Begin to copy full blocks that may be lost to the host, as many as hide under a step
        of this length, so that preemption is free when it comes (equation 26)."""
        copies, table = self._copies, self._table
        if copies is None or self._options.offload is not KVOffload.ASYNCHRONOUS:
            return
        unused_s = step_s - copies.onboard_s(self.step.num_reloaded_blocks)
        # Twice what fits: copies of the step before have mostly ended by the middle of this one.
        budget = 2 * copies.max_offload_blocks(unused_s) - self.kv.num_leaving_blocks
        num_full = table.num_computed_tokens // self.kv.block_size_tokens
        num_pending = np.minimum(num_full, self.kv.num_host_blocks) - table.num_offloaded_blocks
        rows = np.flatnonzero((num_pending > 0) & (table.num_blocks > 0))
        if budget <= 0 or not len(rows):
            return
        scheduled = set(scheduled_ids)
        from_tail = self._order.sort(rows)[::-1]
        thresholds = self._thresholds(from_tail)
        is_due = num_pending[from_tail] >= thresholds
        due = [row for row, due in zip(from_tail, is_due.tolist(), strict=True) if due]
        due.sort(key=lambda row: table.requests[row].request_id in scheduled)
        for row in due:
            if budget <= 0:
                break
            request = table.requests[row]
            transfer = self.kv.offload(request, budget)
            table.num_offloaded_blocks[row] = self.kv.num_offloaded_blocks(request)
            if transfer is not None:
                self.step.transfers.append(transfer)
                budget -= len(transfer.device_block_ids)

    def end_transfers(self, completed: Iterable[int], failed: Mapping[int, str]) -> set[str]:
        """Account for copies that have ended; return the requests whose KV did not arrive."""
        for transfer_id in completed:
            self.kv.complete(transfer_id)
        lost_ids: set[str] = set()
        for transfer_id in failed:
            transfer = self.kv.fail(transfer_id)
            request = self._table.get(transfer.request_id)
            if request is None:
                continue
            if transfer.direction is TransferDirection.ONBOARD:
                self._lose(request)
                lost_ids.add(transfer.request_id)
            else:
                row = self._table.row_of(transfer.request_id)
                self._table.num_offloaded_blocks[row] = 0
        return lost_ids

    def note_arrival(self, row: int) -> None:
        """Learn of a new request: part of its prompt may be known already."""
        if self.kv.has_keys:
            self._note_restorable(row, self.kv.restorable(self._table.requests[row]))

    def forget(self, request: Request) -> None:
        """Drop all of a request that has ended."""
        self.kv.forget(request.request_id)
        self._restorable_ids.discard(request.request_id)

    def holders(self) -> Indices:
        """Return the rows of requests that own blocks."""
        return np.flatnonzero(self._table.num_blocks)

    def _make_room(self, row: int, num_blocks: int) -> bool:
        """Have so many blocks at hand; False if that is not possible now."""
        victims = self._victims(row, num_blocks)
        if victims is None:
            return False
        for victim in victims:
            self.preempt(victim)
        has_room = self.kv.num_free_device_blocks >= num_blocks
        self.step.is_waiting |= not has_room
        return has_room

    def _victims(self, row: int, num_blocks: int) -> list[Request] | None:
        """Return who must be preempted so that a request gets so many blocks, now or when the
        copies on their way have ended; None if nobody, or too few, may be."""
        num_short = num_blocks - self.kv.num_free_device_blocks
        if num_short <= 0:
            return []
        request = self._table.requests[row]
        if not self._claims.may_claim(request, self._now_s):
            return None
        num_short -= self.kv.num_blocks_about_to_free()
        victims: list[Request] = []
        position, claim = self._order.position(row), self._claims.of(request)
        for victim_row, victim_position, victim_claim in self._owners_from_tail():
            if num_short <= 0 or victim_position <= position:
                break
            if claim < victim_claim and self._table.num_blocks[victim_row]:
                victim = self._table.requests[victim_row]
                victims.append(victim)
                num_short -= self.kv.num_sole_blocks(victim.request_id)
        return None if num_short > 0 else victims

    def _owners_from_tail(self) -> list[tuple[int, Position, Claim]]:
        """Return who owned blocks when somebody first ran short, from the tail of the queue.
        Who gets blocks while the step is filled ranks before all who come after."""
        if self._holders_from_tail is None:
            requests = self._table.requests
            self._holders_from_tail = [
                (row, self._order.position(row), self._claims.of(requests[row]))
                for row in reversed(self._order.sort(self.holders()))
            ]
        return self._holders_from_tail

    def _adopt(self, row: int, restored: Restorable) -> None:
        request = self._table.requests[row]
        transfer = self.kv.adopt(request, restored)
        if transfer is not None:
            self.step.transfers.append(transfer)
            self.step.num_reloaded_blocks += len(transfer.device_block_ids)
        num_tokens = restored.num_blocks * self.kv.block_size_tokens
        request.num_computed_tokens += num_tokens
        if request.num_preemptions:
            self.step.num_kept_tokens += num_tokens
        else:
            self.step.num_prefix_tokens += num_tokens
        left = self._table.num_restorable_tokens[row] - num_tokens
        self._table.num_restorable_tokens[row] = max(0, left)
        if left > 0:
            self._restorable_ids.add(request.request_id)
        self._table.num_blocks[row] = self.kv.num_owned_blocks(request.request_id)
        self._table.refresh(request)

    def _lose(self, request: Request) -> None:
        """Take all blocks from a request."""
        self.kv.free(request.request_id)
        request.num_lost_tokens = max(request.num_lost_tokens, request.num_computed_tokens)
        request.num_computed_tokens = 0
        row = self._table.row_of(request.request_id)
        self._table.num_blocks[row] = 0
        self._table.num_offloaded_blocks[row] = 0
        self._table.refresh(request)
        if self.kv.has_keys:
            self._note_restorable(row, self.kv.restorable(request))

    def _note_restorable(self, row: int, restorable: Restorable) -> None:
        request_id = self._table.requests[row].request_id
        num_tokens = restorable.num_blocks * self.kv.block_size_tokens
        self._table.num_restorable_tokens[row] = num_tokens
        if num_tokens:
            self._restorable_ids.add(request_id)
        else:
            self._restorable_ids.discard(request_id)

    def _num_reloads_left(self) -> int:
        if self.step.copy_budget_blocks is None:
            self.step.copy_budget_blocks = self._copy_budget()
        return max(0, self.step.copy_budget_blocks - self.step.num_reloaded_blocks)

    def _copy_budget(self) -> int:
        """Return how many blocks may be reloaded in this step. What is restorable counts as on
        the host, though some of it may still be on the device."""
        if self._copies is None:
            return 0
        if not self._options.copy_budget:
            return self.kv.num_host_blocks
        table, model = self._table, self._model
        rows = np.array([table.row_of(i) for i in self._restorable_ids], dtype=np.intp)
        work_s: Floats = table.work_s(model)
        return copy_budget(
            [self._candidate(row) for row in self._order.sort(rows)],
            full_work_s=model.step_constant_s(has_prefill=True) + float(work_s.sum()),
            budget_s=self._budget_s,
            copies=self._copies,
        )

    def _candidate(self, row: int) -> ReloadCandidate:
        request, size = self._table.requests[row], self.kv.block_size_tokens
        num_computed, num_tokens = request.num_computed_tokens, request.num_tokens

        def work_s(num_blocks: int) -> float:
            num_cached = num_computed + num_blocks * size
            return self._model.prefill_s(num_tokens - num_cached, num_cached)

        num_blocks = int(self._table.num_restorable_tokens[row]) // size
        return ReloadCandidate(num_blocks, work_s)

    def _thresholds(self, rows_from_tail: Sequence[int]) -> Floats:
        """Return how many full blocks of each request wait before they are copied (26)."""
        options, weight = self._options, self._table.weight[rows_from_tail]
        least, most = options.offload_threshold_blocks, options.max_offload_threshold_blocks
        use = 1 - self.kv.num_free_device_blocks / self.kv.num_device_blocks
        if use < _LITTLE_USE:
            return np.full(len(rows_from_tail), float(least))
        positive = weight[weight > 0]
        least_weight = float(positive.min()) if len(positive) else 1.0
        rank = np.arange(len(rows_from_tail)) / len(rows_from_tail)
        threshold = np.round(least * weight / least_weight * (1 + rank))
        if use > _MUCH_USE:
            threshold = np.round(threshold / 2)
        return np.clip(threshold, 1, most)
