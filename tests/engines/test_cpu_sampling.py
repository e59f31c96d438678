"""Drawing by the CPU kernels: the tokens that the plain sampler draws."""

from __future__ import annotations

import random

import pytest
import torch

from engines.torch_engine.cpu_sampling import draw_on_cpu
from orchestrator.core.request import Request, SamplingParams
from orchestrator.sampling import InvalidLogits, Sampler
from tests.factories import make_request
from tests.mixed_sampling import mixed_requests

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def token_ids(sampler: Sampler, logits: torch.Tensor, requests: list[Request]) -> list[int]:
    return [token.token_id for token in sampler.sample(logits, requests)]


def largest_of_groups(scores: torch.Tensor) -> torch.Tensor:
    """Return the largest of every 32 scores of each row."""
    return torch.stack([group.amax(dim=1) for group in scores.split(32, dim=1)], dim=1).contiguous()


@pytest.mark.parametrize("vocab_size", [7, 300, 4_096, 49_152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_draw_what_the_plain_sampler_draws(vocab_size: int, dtype: torch.dtype) -> None:
    """Numbers rounded to bfloat16 have many equals, which top-k and top-p keep or drop together."""
    requests = mixed_requests()
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (3 * torch.randn(len(requests), vocab_size, generator=generator)).to(dtype).float()

    found = token_ids(Sampler(vocab_size, draw_on_cpu=draw_on_cpu), logits, requests)

    assert found == token_ids(Sampler(vocab_size), logits, requests)


@pytest.mark.parametrize("has_largest", [False, True])
def test_the_kernels_draw_the_same_at_every_extreme(*, has_largest: bool) -> None:
    """Temperatures from none to even odds for all, truncations that keep one token or nearly all,
    and tokens that a grammar excludes; also where the largest of every 32 scores are known."""
    draw = random.Random(1)
    requests = [
        make_request(
            str(index),
            sampling=SamplingParams(
                max_tokens=1,
                seed=index,
                temperature=draw.choice([1e-30, 1e-3, 0.3, 1.0, 2.0, 50.0, 1e25]),
                top_p=draw.choice([1.0, 0.999_999, 0.9, 0.3, 1e-6]),
                top_k=draw.choice([0, 1, 2, 40, 999, 100_000]),
                min_p=draw.choice([0.0, 0.0, 0.1, 1.0]),
            ),
        )
        for index in range(400)
    ]
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(len(requests), 1_000, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.3] = -torch.inf

    known = largest_of_groups(logits) if has_largest else None
    sampler = Sampler(1_000, draw_on_cpu=lambda s, p: draw_on_cpu(s, p, largest=known))

    assert token_ids(sampler, logits, requests) == token_ids(Sampler(1_000), logits, requests)


def test_a_greedy_row_takes_the_first_of_its_largest_scores() -> None:
    """With the largest of every 32 known, and without."""
    scores = torch.zeros(2, 100)
    scores[0, [70, 71, 99]] = 5.0
    scores[1, 99] = 1.0
    requests = mixed_requests()[:2]
    largest = largest_of_groups(scores)
    known = Sampler(100, draw_on_cpu=lambda s, p: draw_on_cpu(s, p, largest=largest))

    assert token_ids(Sampler(100, draw_on_cpu=draw_on_cpu), scores, requests) == [70, 99]
    assert token_ids(known, scores, requests) == [70, 99]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("has_largest", [False, True])
def test_rows_that_are_no_numbers_are_named(bad: float, *, has_largest: bool) -> None:
    """Of a row of nothing but -inf no token can be drawn either."""
    requests = mixed_requests()
    scores = torch.randn(len(requests), 300)
    scores[5, :] = bad if bad == float("-inf") else scores[5]
    scores[5, 7] = bad
    largest = largest_of_groups(scores)
    sampler = Sampler(
        300,
        draw_on_cpu=lambda s, p: draw_on_cpu(s, p, largest=largest if has_largest else None),
    )

    with pytest.raises(InvalidLogits, match=r"infinite for request 5$"):
        sampler.sample(scores, requests)
