"""Drawing on a CUDA device, as far as it can be shown on the CPU: the same tokens."""

from __future__ import annotations

import itertools

import pytest
import torch

from orchestrator.core.request import Request, SamplingParams
from orchestrator.sampling import InvalidLogits, Sampler, sample_on_device
from tests.factories import make_request

VOCAB_SIZE = 300


def make_requests() -> list[Request]:
    """Every mixture of truncations, greedy and drawn rows side by side."""
    choices = itertools.product((0.0, 0.7, 2.0), (0, 1, 5, 10_000), (1.0, 0.9, 0.3), (0.0, 0.1))
    return [
        make_request(
            str(index),
            sampling=SamplingParams(
                max_tokens=1, seed=index, temperature=t, top_k=k, top_p=p, min_p=m
            ),
        )
        for index, (t, k, p, m) in enumerate(choices)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_draws_what_the_cpu_draws(dtype: torch.dtype) -> None:
    """bfloat16 has many equal logits, which top-k and top-p keep or drop together."""
    requests = make_requests()
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(len(requests), VOCAB_SIZE, generator=generator)).to(dtype)

    expected = [token.token_id for token in Sampler(VOCAB_SIZE).sample(logits, requests)]

    assert sample_on_device(logits, requests) == expected
    assert sample_on_device(logits[:1], requests[:1]) == expected[:1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_are_named(bad: float) -> None:
    requests = make_requests()
    logits = torch.randn(len(requests), VOCAB_SIZE)
    logits[5, 7] = bad

    with pytest.raises(InvalidLogits, match=r"infinite for request 5$"):
        sample_on_device(logits, requests)
