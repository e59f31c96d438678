"""Draws tokens by the CPU kernels; for `orchestrator.sampling.Sampler`."""

from __future__ import annotations

import numpy as np
import torch

from engines.torch_engine.cpu_library import load_library
from orchestrator.device_sampling import DrawParameters, PendingTokens


def draw_on_cpu(
    scores: torch.Tensor, parameters: DrawParameters, *, largest: torch.Tensor | None = None
) -> PendingTokens:
    """Draw one token per row of (num_rows, vocab_size); -1 where the largest score is not finite.

    `largest` is the largest of every 32 scores, (num_rows, vocab_size / 32), rounded up: with it,
    a greedy row need not be read again.

    In the same integers as `orchestrator.device_sampling.draw_on_device`, but for the last bit of
    an exponential function.
    """
    scores = scores.to(torch.float32).contiguous()
    num_rows, vocab_size = scores.shape
    p = parameters
    columns = np.stack((p.is_greedy, p.temperature, p.min_weight, p.top_k, p.top_p, p.fraction))
    token_ids = np.empty(num_rows, np.int64)
    load_library().proserve_draw(
        scores.data_ptr(),
        num_rows,
        vocab_size,
        None if largest is None else largest.data_ptr(),
        columns.ctypes.data,
        1 if largest is not None and p.is_greedy.all() else min(torch.get_num_threads(), num_rows),
        token_ids.ctypes.data,
    )
    return PendingTokens.drawn(token_ids.tolist())
