"""GoRouting: sends a request where it adds the most gain, and keeps room for the next one.

Source: ProServe (arXiv 2512.12928); equation and open-choice (OC) numbers are those of this
project's specification. For every node p on offer, with Q_p its prompts that wait:

    Load_p(U)  seconds until all of U are past prefill                        (28, 29)
    Gain_p(U)  weight of those of U whose first token is then still in time   (30)
    Delta_p    Gain_p(Q_p and the request) - Gain_p(Q_p)                      (31)

The candidates are the nodes whose Delta_p is near the best (32). Among them:

    (i)    one is as good as idle              the least loaded: leave nobody without work
    (ii)   all would be heavily loaded         the least loaded: balance
    (iii)  some would not                      the most loaded of those: keep the light ones free

If nobody can gain, the paper's rule is the least loaded of all. By default such requests go
together instead, to few nodes, so that those who come next find the others free (`LostRule`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from router.fleet import DrainOptions, Flags, Fleet, Floats, least_row
from router.policy import NO_NODE, RoutingDecision, RoutingRequest
from router.prefix_index import PrefixIndex, PrefixIndexOptions

_LEAST_STEPS_S = 2.0
"""Least latency budget in what a step costs without prompts: as the engine's own bound (OC-3)."""

_LEAST_STEP_S = 1e-9
"""A step that a profile prices at nothing still takes time."""


class IdleRule(StrEnum):
    """When case (i) sends a request to the least loaded candidate (OC-20)."""

    IDLE_FIRST = "idle-first"
    """As soon as one candidate is as good as idle: the author's branch."""

    NONE_HEAVY = "none-heavy"
    """If no candidate would be heavily loaded: the wording of the second version."""


class LostRule(StrEnum):
    """Where a request goes that gains nothing anywhere."""

    LEAST_LOADED = "least-loaded"
    """To the least loaded of all, as in the paper."""

    TOGETHER = "together"
    """To the most loaded of those where it does the least harm: what is lost piles up on few
    nodes and leaves the others to those who can still be in time."""


class GainEstimate(StrEnum):
    """When a queued prompt is taken to have its first token."""

    WHOLE_QUEUE = "whole-queue"
    """When the whole queue is past prefill (30)."""

    POSITION = "position"
    """When it and what is due before it are, in steps of the node's latency budget."""


@dataclass(frozen=True, slots=True)
class GoRoutingOptions(DrainOptions):
    """The paper's parameters, this project's open choices and extensions; extensions are off by
    default but for `lost_rule`, which docs/evaluation.md has the figures for."""

    kappa: float = 0.9
    """Share of the time until a deadline that a queue may take for the first token to count as in
    time (30)."""

    theta_c: float = 0.9
    """A node is a candidate if it gains more than this share of the best (32)."""

    theta_lo: float = 0.1
    """A candidate whose load is below this share of the request's TTFT objective is as good as
    idle (case i)."""

    theta_hi: float = 0.8
    """A candidate is heavily loaded if its load with the request exceeds this share of the TTFT
    objective (cases ii and iii)."""

    idle_rule: IdleRule = IdleRule.IDLE_FIRST
    """Reading of case (i)."""

    lost_rule: LostRule = LostRule.TOGETHER
    """Where a request goes that gains nothing anywhere; the paper's is `least-loaded`."""

    estimate: GainEstimate = GainEstimate.WHOLE_QUEUE
    """When queued prompts are taken to have their first tokens."""

    position_safety: float = 0.8
    """`kappa` of the estimate `position`."""

    ranks_with_request: bool = False
    """Whether the least loaded node is the one that is past its queue first with the request in
    it, not without, as in the paper. It then counts how fast a node computes the prompt and, with
    `prefix_reuse`, what it has of it."""

    decode_loss_weight: float = 0.0
    """Later tokens of each running request that count in a gain when its node would become too
    slow for them, in first tokens; 0 leaves running requests out, as the paper does."""

    needs_free_blocks: bool = False
    """Whether a node without free KV blocks for its queue and the request is left out, unless all
    are."""

    prefix_reuse: bool = False
    """Whether prompts that begin like earlier ones, of those that may share KV, are taken to cost
    less on the nodes that had those."""

    def __post_init__(self) -> None:
        DrainOptions.__post_init__(self)
        for name, is_valid, rule in (
            ("kappa", 0 < self.kappa <= 1, "above 0 and at most 1"),
            ("theta_c", 0 <= self.theta_c < 1, "at least 0 and below 1"),
            ("theta_lo", 0 <= self.theta_lo < math.inf, "at least 0 and finite"),
            ("theta_hi", 0 <= self.theta_hi < math.inf, "at least 0 and finite"),
            ("position_safety", 0 < self.position_safety <= 1, "above 0 and at most 1"),
            ("decode_loss_weight", 0 <= self.decode_loss_weight < math.inf, "at least 0, finite"),
        ):
            if not is_valid:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be {rule}")


class GoRoutingPolicy:
    """See the module's text."""

    def __init__(
        self,
        options: GoRoutingOptions = GoRoutingOptions(),
        prefix_index: PrefixIndexOptions | None = None,
    ) -> None:
        """`prefix_index`, by default its defaults, is for the option `prefix_reuse` alone."""
        self._options = options
        self._prefixes: PrefixIndex | None = None
        if options.prefix_reuse:
            self._prefixes = PrefixIndex(prefix_index or PrefixIndexOptions())

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        """Return the node that the cases (i) to (iii) lead to."""
        if self._options.needs_free_blocks:
            offered = _with_free_blocks(request, fleet, offered)
        if not offered.any():
            return NO_NODE
        keys: Sequence[bytes] = ()
        num_cached: Floats | None = None
        if self._prefixes is not None:
            keys = self._prefixes.keys_of(request)
            num_cached = self._prefixes.num_cached(keys, fleet.endpoint_ids)
        prefill_s = fleet.prefill_s(request.num_prompt_tokens, num_cached)
        load_s, load_after_s = fleet.loads_s(prefill_s, now_s)
        delta = self._delta(request, fleet, prefill_s, (load_s, load_after_s), now_s)
        if self._options.decode_loss_weight:
            delta -= self._options.decode_loss_weight * _decode_loss(request, fleet)
        row, case = self._choose(request.slo.ttft_s, offered, delta, load_s, load_after_s)
        if self._prefixes is not None:
            self._prefixes.note(keys, fleet.endpoint_ids[row])
        gain = float(delta[row])
        return RoutingDecision(
            fleet.endpoint_ids[row],
            gain,
            f"{case}: gain {gain:.3g}, load {load_s[row]:.3g} s, then {load_after_s[row]:.3g} s",
            is_satisfiable=bool(self._options.kappa * (request.due_s - now_s) > load_after_s[row]),
        )

    def _delta(
        self,
        request: RoutingRequest,
        fleet: Fleet,
        prefill_s: Floats,
        loads_s: tuple[Floats, Floats],
        now_s: float,
    ) -> Floats:
        """Return what each node gains by the request (31)."""
        if self._options.estimate is GainEstimate.POSITION:
            safety = self._options.position_safety
            return gain_by_position(request, fleet, prefill_s, safety=safety, now_s=now_s)
        return gain_by_whole_queue(request, fleet, loads_s, kappa=self._options.kappa, now_s=now_s)

    def _choose(
        self, ttft_s: float, offered: Flags, delta: Floats, load_s: Floats, load_after_s: Floats
    ) -> tuple[int, str]:
        """Return the row and the name of the case that led to it."""
        options = self._options
        rank_s = load_after_s if options.ranks_with_request else load_s
        best = delta[offered].max()
        if best <= 0:
            if options.lost_rule is LostRule.LEAST_LOADED:
                return least_row(rank_s, offered), "no gain anywhere"
            return least_row(-load_s, offered & (delta == best)), "no gain anywhere, least harm"
        is_candidate = offered & (delta > options.theta_c * best)
        is_light = is_candidate & (load_after_s <= options.theta_hi * ttft_s)
        if options.idle_rule is IdleRule.IDLE_FIRST:
            is_idle = is_candidate & (load_s < options.theta_lo * ttft_s)
            if is_idle.any():
                return least_row(rank_s, is_idle), "idle"
        elif np.array_equal(is_light, is_candidate):
            return least_row(rank_s, is_candidate), "none heavy"
        if not is_light.any():
            return least_row(rank_s, is_candidate), "all heavy"
        return least_row(-load_s, is_light), "most loaded of the light"


def gain_by_whole_queue(
    request: RoutingRequest,
    fleet: Fleet,
    loads_s: tuple[Floats, Floats],
    *,
    kappa: float,
    now_s: float,
) -> Floats:
    """Return what each node gains by the request (31), if every first token of a queue comes when
    the whole queue is past prefill (30).

    What counts before and no longer afterwards are the queued prompts that are due between the
    two moments.
    """
    before_s, after_s = (now_s + load_s / kappa for load_s in loads_s)
    is_lost = fleet.due_s > before_s[:, None]
    is_lost &= fleet.due_s <= after_s[:, None]
    lost: Floats = (fleet.weight * is_lost) @ np.ones(is_lost.shape[1])
    return np.where(request.due_s > after_s, request.weight, 0.0) - lost


def gain_by_position(
    request: RoutingRequest, fleet: Fleet, prefill_s: Floats, *, safety: float, now_s: float
) -> Floats:
    """Return what each node gains by the request (31), if prompts are computed by deadline.

    A prompt that ends with the first E seconds of work has its first token at the end of its
    step: after ceil(E / (B - c)) steps of B, or of what is there if the last one is not full.
    """
    is_later = fleet.due_s > request.due_s
    left_s = fleet.work_left_s(now_s)
    all_left_s = left_s[:, -1:]
    own_left_s = left_s[:, -1] - (fleet.work_s * is_later).sum(axis=1) + prefill_s
    left_after_s = left_s + is_later * prefill_s[:, None]
    all_left_after_s = all_left_s + prefill_s[:, None]
    allowed_s = safety * (fleet.due_s - now_s)
    is_in_time = allowed_s > _step_ends_s(fleet, left_s, all_left_s)
    is_in_time_after = allowed_s > _step_ends_s(fleet, left_after_s, all_left_after_s)
    own_end_s = _step_ends_s(fleet, own_left_s[:, None], all_left_after_s)[:, 0]
    own_gain = np.where(safety * (request.due_s - now_s) > own_end_s, request.weight, 0.0)
    lost: Floats = (fleet.weight * (is_in_time & ~is_in_time_after)).sum(axis=1)
    return own_gain - lost


def _step_ends_s(fleet: Fleet, work_s: Floats, all_work_s: Floats) -> Floats:
    """Return when the step ends that completes each amount of work, (num_endpoints, any)."""
    step_s = fleet.figures.step_s[:, None]
    budget_s = np.maximum(fleet.figures.latency_budget_s[:, None], _LEAST_STEPS_S * step_s)
    usable_s = np.maximum(budget_s - step_s, _LEAST_STEP_S)
    work_s = np.maximum(work_s, 0.0)
    num_steps = np.maximum(np.ceil(work_s / usable_s), 1.0)
    is_last_open = all_work_s < num_steps * usable_s
    return np.where(is_last_open, work_s + num_steps * step_s, num_steps * budget_s)


def _decode_loss(request: RoutingRequest, fleet: Fleet) -> Floats:
    """Return the gain per token that each node's running requests lose to one more.

    A node that needs s seconds for a step gives at most the share TPOT / s of its tokens in time.
    """
    figures = fleet.figures
    own_s = figures.decode_token_s + figures.decode_context_s * request.num_prompt_tokens
    before_s = np.maximum(figures.decode_step_s, _LEAST_STEP_S)
    after_s = before_s + own_s
    late = np.maximum(1.0 - figures.min_decode_tpot_s / before_s, 0.0)
    late_after = np.maximum(1.0 - figures.min_decode_tpot_s / after_s, 0.0)
    own_late = np.maximum(1.0 - request.slo.tpot_s / after_s, 0.0)
    loss: Floats = figures.decode_weight * (late_after - late) + request.weight * own_late
    return loss


def _with_free_blocks(request: RoutingRequest, fleet: Fleet, offered: Flags) -> Flags:
    """Return the nodes on offer that have free KV blocks for their queue and the request; all on
    offer if none has."""
    figures = fleet.figures
    num_free_tokens = figures.num_free_blocks * figures.block_size_tokens
    has_room = figures.num_queued_tokens + request.num_prompt_tokens <= num_free_tokens
    has_room &= offered
    return has_room if has_room.any() else offered
