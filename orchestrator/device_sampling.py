"""Drawing tokens on a CUDA device: `orchestrator.sampling`'s steps 4 to 8, in the same integers.

One copy to the device, one back, and a wait for that alone, in `PendingTokens.wait`: a step that
needs the tokens on the device can be begun before. Rows are never picked apart by what the device
has computed, nor by lists of the host. Greedy rows are drawn like all others and then overruled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DrawParameters:
    """One entry per row, float64. A row with `is_greedy` needs none of the others."""

    is_greedy: NDArray[np.float64]
    temperature: NDArray[np.float64]
    min_weight: NDArray[np.float64]
    """Of a token that stays, by min-p."""

    top_k: NDArray[np.float64]
    """0 keeps all."""

    top_p: NDArray[np.float64]
    fraction: NDArray[np.float64]
    """In [0, 1): which part of the mass the token is drawn at."""


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """One token per row, which a device may still be drawing; -1 where the largest score is not
    finite."""

    device_ids: torch.Tensor  # (num_rows,), int64, where the scores are
    _wait: Callable[[], list[int]]

    @classmethod
    def drawn(cls, token_ids: Sequence[int]) -> PendingTokens:
        """Return tokens that the host has drawn."""
        numbers = list(token_ids)
        return cls(torch.tensor(numbers, dtype=torch.int64), lambda: numbers)

    @classmethod
    def being_drawn(cls, device_ids: torch.Tensor) -> PendingTokens:
        """Return tokens that the device has been told to draw, and begin to fetch them."""
        return cls(device_ids, _begin_to_fetch(device_ids))

    def wait(self) -> list[int]:
        """Return the tokens, when they are drawn."""
        return self._wait()


def most_likely_on_device(scores: torch.Tensor) -> PendingTokens:
    """Begin to find each row's first most likely token."""
    best_ids, best_scores = _most_likely(scores)
    return PendingTokens.being_drawn(torch.where(torch.isfinite(best_scores), best_ids, -1))


def draw_on_device(
    scores: torch.Tensor, parameters: DrawParameters, *, max_weight: int
) -> PendingTokens:
    """Begin to draw one token per row. `max_weight` is the weight of a row's most likely token."""
    best_ids, best_scores = _most_likely(scores)
    p = parameters
    columns = _upload(
        np.stack((p.is_greedy, p.temperature, p.min_weight, p.top_k, p.top_p, p.fraction)),
        scores.device,
    ).unsqueeze(-1)
    is_greedy, temperature, min_weight, top_k, top_p, fraction = columns

    relative = scores.to(torch.float32, copy=True).sub_(best_scores.unsqueeze(-1))
    weights = relative.div_(temperature.to(torch.float32)).exp_().mul_(max_weight).to(torch.int64)
    weights.masked_fill_(weights < min_weight.to(torch.int64), 0)
    if (p.top_k > 0).any():
        max_top_k = int(min(p.top_k.max(), weights.shape[-1]))
        largest = weights.topk(max_top_k, dim=-1).values
        place = (top_k.to(torch.int64) - 1).clamp_(0, max_top_k - 1)
        keeps_all = (top_k == 0) | (top_k > max_top_k)
        floor = largest.gather(-1, place).masked_fill_(keeps_all, 0)
        weights.masked_fill_(weights < floor, 0)
    if (p.top_p < 1).any():
        floor = _nucleus_floor(weights, top_p).masked_fill_(top_p >= 1, 0)
        weights.masked_fill_(weights < floor, 0)

    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.minimum((total * fraction).to(torch.int64), total - 1)
    drawn_ids = torch.searchsorted(cumulative, target, right=True)
    token_ids = torch.where(is_greedy > 0, best_ids.unsqueeze(-1), drawn_ids).squeeze(-1)
    return PendingTokens.being_drawn(torch.where(torch.isfinite(best_scores), token_ids, -1))


def _most_likely(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    best_ids = scores.argmax(dim=-1)
    return best_ids, scores.gather(-1, best_ids.unsqueeze(-1)).squeeze(-1)


def _nucleus_floor(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Return each row's smallest weight inside its nucleus, (num_rows, 1)."""
    needed = (weights.sum(dim=-1, keepdim=True) * top_p).ceil().to(torch.int64)
    largest_first = weights.sort(dim=-1, descending=True).values
    num_short = (largest_first.cumsum(dim=-1) < needed).sum(dim=-1, keepdim=True)
    # A mass that no sum reaches, by rounding: all stay.
    return largest_first.gather(-1, num_short.clamp_(max=weights.shape[-1] - 1))


def _upload(array: NDArray[np.float64], device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(array)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _begin_to_fetch(token_ids: torch.Tensor) -> Callable[[], list[int]]:
    """Return what waits for these numbers and returns them."""
    if not token_ids.is_cuda:
        return token_ids.tolist
    host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
    _store_on_host()(token_ids, host)
    # Not the stream's own wait, in which PyTorch would see one that nobody meant.
    stored = torch.cuda.Event()
    stored.record()

    def wait() -> list[int]:
        stored.synchronize()
        numbers: list[int] = host.tolist()
        return numbers

    return wait


@functools.cache
def _store_on_host() -> Callable[[torch.Tensor, torch.Tensor], None]:
    # Imported here because PyTorch for the CPU comes without Triton.
    try:
        from orchestrator.triton_fetch import store_on_host
    except ModuleNotFoundError:
        return _copy_to_host
    return store_on_host


def _copy_to_host(numbers: torch.Tensor, host: torch.Tensor) -> None:
    host.copy_(numbers, non_blocking=True)
