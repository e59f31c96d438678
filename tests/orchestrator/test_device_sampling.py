"""Drawing on a CUDA device, as far as it can be shown on the CPU: the same tokens."""

from __future__ import annotations

import pytest
import torch

from orchestrator.sampling import Sampler, sample_on_device
from tests.mixed_sampling import mixed_requests

VOCAB_SIZE = 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_draws_what_the_cpu_draws(dtype: torch.dtype) -> None:
    """bfloat16 has many equal logits, which top-k and top-p keep or drop together."""
    requests = mixed_requests()
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(len(requests), VOCAB_SIZE, generator=generator)).to(dtype)

    expected = [token.token_id for token in Sampler(VOCAB_SIZE).sample(logits, requests)]

    assert sample_on_device(logits, requests).wait() == expected
    assert sample_on_device(logits[:1], requests[:1]).wait() == expected[:1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_get_no_token(bad: float) -> None:
    requests = mixed_requests()
    logits = torch.randn(len(requests), VOCAB_SIZE)
    logits[5, 7] = bad

    token_ids = sample_on_device(logits, requests).wait()

    assert [row for row, token_id in enumerate(token_ids) if token_id < 0] == [5]
