"""Numbers from a CUDA device to the host by a kernel, which copies cannot hold up.

A copy to the host waits until the copies that were begun before it have ended, those of KV blocks
that other streams are at among them: 6.8 ms behind 512 MB on an H200. A kernel takes 0.2 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 256


def store_on_host(numbers: torch.Tensor, host: torch.Tensor) -> None:
    """Queue a copy of `numbers` to `host`, which is pinned memory; both are contiguous."""
    count = numbers.numel()
    _store_kernel[(triton.cdiv(count, _BLOCK),)](numbers, host, count, BLOCK=_BLOCK)


@triton.jit(do_not_specialize=["count"])
def _store_kernel(numbers, host, count, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = places < count
    tl.store(host + places, tl.load(numbers + places, mask=is_inside), mask=is_inside)
