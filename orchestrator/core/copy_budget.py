"""How many KV blocks may come back from the host in one step without delaying it.

Source: ProServe (arXiv 2512.12928) and the released xLLM code; equation and open-choice (OC)
numbers are those of this project's specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.core.kv_transfer import CopyProfile


class CopyModel:
    """Predicts how long blocks take between host and device."""

    def __init__(self, profile: CopyProfile, *, num_layer_groups: int) -> None:
        self.profile = profile
        self._num_groups = num_layer_groups

    def onboard_s(self, num_blocks: int) -> float:
        """Return how long so many blocks take to the device (equation 15); 0 for none."""
        if num_blocks == 0:
            return 0.0
        return self.profile.start_s + num_blocks * self.profile.onboard_block_s

    def offload_s(self, num_blocks: int) -> float:
        """Return how long so many blocks take to the host; 0 for none."""
        if num_blocks == 0:
            return 0.0
        return self.profile.start_s + num_blocks * self.profile.offload_block_s

    def stall_s(self, num_blocks: int) -> float:
        """Return for how long a step cannot compute: until the first layer group has its part of
        the onboarded blocks. The other parts arrive while the groups before them compute, if the
        whole copy takes no longer than the computation (OC-18). Groups are taken for equal; if
        they grow, the first waits for less, and the last for some of a copy as long as that."""
        return self.onboard_s(num_blocks) / self._num_groups

    def max_onboard_blocks(self, budget_s: float) -> int:
        """Return how many blocks can be onboarded in this time (equation 15)."""
        return _blocks_in(budget_s - self.profile.start_s, self.profile.onboard_block_s)

    def max_offload_blocks(self, budget_s: float) -> int:
        """Return how many blocks can be offloaded in this time."""
        return _blocks_in(budget_s - self.profile.start_s, self.profile.offload_block_s)


def _blocks_in(budget_s: float, block_s: float) -> int:
    if budget_s <= 0:
        return 0
    # Copies that take no time are bounded by the blocks there are, not here.
    return int(min(budget_s / block_s, 1e9)) if block_s > 0 else 10**9


@dataclass(frozen=True, slots=True)
class ReloadCandidate:
    """A request of the queue with blocks on the host only."""

    num_host_blocks: int
    """h_r, at least 1."""

    work_s: Callable[[int], float]
    """Predicted marginal cost of the request if its first so many of them are reloaded and the
    rest is computed again; falls as the number rises."""


def copy_budget(
    candidates: Sequence[ReloadCandidate],
    *,
    full_work_s: float,
    budget_s: float,
    copies: CopyModel,
) -> int:
    """Return how many blocks to reload in this step, to be spent from the head of the queue.

    `candidates` come in rank order; `full_work_s` is the step's constant and the work of the
    whole queue if everything is reloaded; `budget_s` is the step's latency budget (equation 27).
    """
    num_host_blocks = sum(candidate.num_host_blocks for candidate in candidates)
    if full_work_s >= budget_s:
        # The step is filled to its time limit anyway: whatever can be copied meanwhile is hidden.
        most = num_host_blocks if math.isinf(budget_s) else copies.max_onboard_blocks(budget_s)
        return min(num_host_blocks, most)
    compute_s, copy_s = full_work_s, copies.onboard_s(num_host_blocks)
    if copy_s <= compute_s:
        return num_host_blocks
    # Give up reloads from the tail until the copy is no longer than the computation.
    block_s = copies.profile.onboard_block_s
    cap = num_host_blocks
    for candidate in reversed(candidates):
        num_blocks = candidate.num_host_blocks
        compute_s -= candidate.work_s(num_blocks)
        copy_s -= block_s * num_blocks
        cap -= num_blocks
        recomputed_s = candidate.work_s(0)
        if copy_s < compute_s + recomputed_s:
            return cap + _crossing(candidate, copy_s, compute_s, block_s)
        compute_s += recomputed_s
    return cap


def _crossing(candidate: ReloadCandidate, copy_s: float, compute_s: float, block_s: float) -> int:
    """Return how many blocks of a request to reload so that the longer of copy and computation
    is shortest; `copy_s` and `compute_s` are those of everything else."""
    low, high = 0, candidate.num_host_blocks
    while low < high:
        middle = (low + high + 1) // 2
        if copy_s + block_s * middle < compute_s + candidate.work_s(middle):
            low = middle
        else:
            high = middle - 1

    def longer_s(num_blocks: int) -> float:
        return max(copy_s + block_s * num_blocks, compute_s + candidate.work_s(num_blocks))

    if low < candidate.num_host_blocks and longer_s(low + 1) < longer_s(low):
        return low + 1
    return low
