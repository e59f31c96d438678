"""Rules that GoRouting is compared with. Ties go to the smallest endpoint id.

Source: section 6.2 of this project's specification, which names where each comes from.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from router.fleet import Flags, Fleet, Floats, least_row
from router.policy import NO_NODE, RoutingDecision, RoutingRequest
from router.prefix_index import PrefixIndex, PrefixIndexOptions


class RoundRobinPolicy:
    """Each node in turn."""

    def __init__(self) -> None:
        self._last_row = -1

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        """Return the next node on offer after the one before."""
        if not offered.any():
            return NO_NODE
        self._last_row = _next_row(np.flatnonzero(offered).tolist(), self._last_row)
        return RoutingDecision(fleet.endpoint_ids[self._last_row], None, "next in turn")


class RandomPolicy:
    """Any node, each as likely."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        """Return a drawn node."""
        rows = np.flatnonzero(offered).tolist()
        if not rows:
            return NO_NODE
        return RoutingDecision(fleet.endpoint_ids[self._random.choice(rows)], None, "drawn")


class LeastRequestPolicy:
    """Fewest requests that have not ended."""

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        """Return the node with the fewest requests."""
        return _least(fleet, offered, fleet.figures.num_requests, "fewest requests")


class LeastLoadPolicy:
    """Fewest outstanding prompt tokens plus decoding requests: Min-Load for nodes that do both."""

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        """Return the least loaded node."""
        return _least(fleet, offered, min_load(fleet), "least load")


class PowerOfTwoPolicy:
    """The less loaded, by Min-Load, of two nodes that are drawn."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        """Return the better of two nodes; with one on offer, that."""
        rows = np.flatnonzero(offered).tolist()
        if not rows:
            return NO_NODE
        drawn = np.zeros(len(fleet), dtype=np.bool_)
        drawn[self._random.sample(rows, min(2, len(rows)))] = True
        return _least(fleet, drawn, min_load(fleet), "less load of two")


@dataclass(frozen=True, slots=True)
class PrefixAwareOptions:
    """When a known beginning counts more than an even load."""

    max_spread: int = 16
    """Most requests that the busiest node may have more than the idlest; beyond, load decides."""

    def __post_init__(self) -> None:
        if self.max_spread < 0:
            raise ValueError(f"max_spread is {self.max_spread}, it must be at least 0")


class PrefixAwarePolicy:
    """Where most of the prompt's beginning was seen, as long as load is spread evenly."""

    def __init__(self, options: PrefixAwareOptions, prefix_index: PrefixIndexOptions) -> None:
        self._options = options
        self._prefixes = PrefixIndex(prefix_index)

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        """Return the node with the longest known beginning, the fewest requests among equals."""
        if not offered.any():
            return NO_NODE
        num_requests = fleet.figures.num_requests
        keys = self._prefixes.keys_of(request)
        num_cached = self._prefixes.num_cached(keys, fleet.endpoint_ids)
        on_offer = num_requests[offered]
        decision: RoutingDecision
        if on_offer.max() - on_offer.min() > self._options.max_spread:
            decision = _least(fleet, offered, num_requests, "uneven load, fewest requests")
        else:
            longest = num_cached[offered].max()
            is_longest = offered & (num_cached == longest)
            reason = f"{longest:.0f} tokens seen there, requests"
            decision = _least(fleet, is_longest, num_requests, reason)
        assert decision.endpoint_id is not None, "a node is on offer"
        self._prefixes.note(keys, decision.endpoint_id)
        return decision


class StaticPartitionPolicy:
    """A part of the nodes for each service class, in turn inside it: what one does without
    co-serving (figure 2 of ProServe).

    Parts are cut in the order of the classes, a node at least for each; with fewer nodes than
    classes, classes share one. A class none of whose nodes is on offer uses the others.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        """`shares`: class -> its part of the nodes, in proportion to the others'."""
        self._shares = dict(shares)
        self._last_row = dict.fromkeys(shares, -1)

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        """Return the next node of the class's part."""
        rows = np.flatnonzero(offered).tolist()
        if not rows:
            return NO_NODE
        name = request.priority_class
        part = self._part(name, len(fleet))
        own = [row for row in rows if row in part]
        row = self._last_row[name] = _next_row(own or rows, self._last_row[name])
        reason = f"next in turn of class {name}" if own else f"no node of class {name} on offer"
        return RoutingDecision(fleet.endpoint_ids[row], None, reason)

    def _part(self, name: str, num_rows: int) -> range:
        total = sum(self._shares.values())
        before = 0.0
        for other, share in self._shares.items():
            if other == name:
                start = min(round(num_rows * before / total), num_rows - 1)
                end = round(num_rows * (before + share) / total)
                return range(start, max(end, start + 1))
            before += share
        raise AssertionError(f"class {name} has no share")


@dataclass(frozen=True, slots=True)
class LlumnixOptions:
    """What counts as used on a node."""

    headroom_fraction: float = 0.1
    """Share of a node's KV blocks that is held free for a running request of the highest class."""

    def __post_init__(self) -> None:
        if not 0 <= self.headroom_fraction <= 1:
            raise ValueError(
                f"headroom_fraction is {self.headroom_fraction}, it must be between 0 and 1"
            )


class LlumnixPolicy:
    """The dispatch rule of Llumnix (OSDI 2024): the freest node, by its virtual usage.

    Freeness = (blocks - virtual usage) / running requests. Virtual usage: blocks in use, what
    the queue will need, and headroom where a request of the highest class runs. Llumnix also
    migrates requests between nodes later; nothing here does.
    """

    def __init__(self, options: LlumnixOptions, *, highest_weight: float) -> None:
        self._options = options
        self._highest_weight = highest_weight

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        """Return the freest node."""
        figures = fleet.figures
        queued = figures.num_queued_tokens / np.maximum(figures.block_size_tokens, 1.0)
        has_highest = figures.max_weight >= self._highest_weight
        headroom = self._options.headroom_fraction * figures.num_blocks * has_highest
        free = figures.num_free_blocks - queued - headroom
        freeness = free / np.maximum(figures.num_running, 1.0)
        return _least(fleet, offered, -freeness, "freest, minus its freeness")


class SloAwarePolicy:
    """The earliest first token by the drain time of the queue (29): xLLM's released rule for
    prompts."""

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        """Return the node that would be past this prompt first."""
        prefill_s = fleet.prefill_s(request.num_prompt_tokens)
        _, load_after_s = fleet.loads_s(prefill_s, now_s)
        return _least(fleet, offered, load_after_s, "earliest first token, seconds")


class HighestLoadFeasiblePolicy:
    """The most loaded node where the first token is still in time, else the earliest: as
    PolyServe packs, and a control for case (iii) of GoRouting."""

    def __init__(self, *, kappa: float) -> None:
        """`kappa`: share of the time until the deadline that the queue may take."""
        self._kappa = kappa

    def pick(
        self, request: RoutingRequest, fleet: Fleet, offered: Flags, now_s: float
    ) -> RoutingDecision:
        """Return the node by the rule above."""
        prefill_s = fleet.prefill_s(request.num_prompt_tokens)
        load_s, load_after_s = fleet.loads_s(prefill_s, now_s)
        is_feasible = offered & (load_after_s < self._kappa * (request.due_s - now_s))
        if is_feasible.any():
            return _least(fleet, is_feasible, -load_s, "most loaded in time, minus its seconds")
        return _least(fleet, offered, load_after_s, "none in time, earliest, seconds")


def min_load(fleet: Fleet) -> Floats:
    """Return each node's outstanding prompt tokens plus its decoding requests."""
    return fleet.figures.num_queued_tokens + fleet.figures.num_decoding


def _least(fleet: Fleet, flags: Flags, values: Floats, what: str) -> RoutingDecision:
    if not flags.any():
        return NO_NODE
    row = least_row(values, flags)
    return RoutingDecision(fleet.endpoint_ids[row], None, f"{what}: {values[row]:.3g}")


def _next_row(rows: Sequence[int], last_row: int) -> int:
    """Return the first of the ascending rows after `last_row`, or the first of all."""
    return next((row for row in rows if row > last_row), rows[0])
