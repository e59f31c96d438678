"""Sampling, against transformers' logits processors and against its own promises."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orchestrator.core.request import Request, SamplingParams
from orchestrator.sampling import InvalidLogits, SampledToken, Sampler, uniform
from tests.factories import make_request

VOCAB_SIZE = 300

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def sampled_request(
    request_id: str = "r",
    *,
    prompt_token_ids: Sequence[int] = (1, 2, 3),
    output_token_ids: Sequence[int] = (),
    seed: int = 0,
    **sampling: Any,
) -> Request:
    request = make_request(
        request_id,
        prompt_token_ids=prompt_token_ids,
        sampling=SamplingParams(max_tokens=1000, seed=seed, **sampling),
    )
    for token_id in output_token_ids:
        request.append_output_token(token_id, 0.0)
    return request


def random_logits(num_rows: int, *, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * 3


def drawn_ids(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    return [token.token_id for token in Sampler(logits.shape[-1]).sample(logits, requests)]


def assert_drawn_by_inverse_cdf(
    probabilities: torch.Tensor, token_ids: Sequence[int], uniforms: Sequence[float]
) -> None:
    """Each number lies in its token's part of [0, 1), parts being in the order of token ids."""
    chances = probabilities.double()
    upper = chances.cumsum(-1)
    for row, (token_id, number) in enumerate(zip(token_ids, uniforms, strict=True)):
        chance, end = float(chances[row, token_id]), float(upper[row, token_id])
        assert chance > 0, f"row {row}: token {token_id} was cut away"
        assert end - chance - 1e-5 <= number < end + 1e-5


WARPERS: dict[str, tuple[dict[str, Any], list[LogitsProcessor]]] = {
    "none": ({}, []),
    "temperature": ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    "hot": ({"temperature": 2.5}, [TemperatureLogitsWarper(2.5)]),
    "top_k": ({"top_k": 7}, [TopKLogitsWarper(7)]),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "small top_p": ({"top_p": 0.05}, [TopPLogitsWarper(0.05)]),
    "large top_p": ({"top_p": 0.9999}, [TopPLogitsWarper(0.9999)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "top_k of everything": ({"top_k": VOCAB_SIZE + 5}, []),
    "all": (
        {"temperature": 1.5, "min_p": 0.02, "top_k": 20, "top_p": 0.9},
        [
            TemperatureLogitsWarper(1.5),
            MinPLogitsWarper(0.02),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
        ],
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WARPERS)
def test_tokens_come_from_the_distribution_of_transformers(name: str, device: str) -> None:
    """Of the same warpers, applied in vLLM's order."""
    params, warpers = WARPERS[name]
    requests = [sampled_request(f"r{seed}", seed=seed, **params) for seed in range(400)]
    logits = random_logits(400)
    scores = logits
    for warper in warpers:
        scores = warper(torch.zeros(400, 1, dtype=torch.long), scores)

    token_ids = drawn_ids(logits.to(device), requests)

    numbers = [uniform(seed, 0) for seed in range(400)]
    assert_drawn_by_inverse_cdf(scores.softmax(-1), token_ids, numbers)


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 seeds; the seeds are fixed, so is the outcome."""
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    requests = [sampled_request(str(seed), seed=seed) for seed in range(20_000)]

    counts = Counter(drawn_ids(probabilities.log().expand(20_000, -1), requests))

    expected = [20_000 * float(p) for p in probabilities]
    observed = [counts[token_id] for token_id in range(6)]
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 0.01


def test_the_numbers_of_one_seed_are_uniform_and_uncorrelated() -> None:
    numbers = [uniform(1234, index) for index in range(20_000)]

    assert stats.kstest(numbers, "uniform").pvalue > 0.01
    assert abs(stats.pearsonr(numbers[1:], numbers[:-1]).statistic) < 0.02
    assert all(0 <= number < 1 for number in numbers)


def test_any_integer_is_a_seed() -> None:
    seeds = [0, 1, -1, 2**63, 2**64 - 2]

    assert len({uniform(seed, 0) for seed in seeds}) == len(seeds)


def mixed_params() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.0, 1e-5, 0.3, 1.0, 3.0]),
            "top_k": st.sampled_from([0, 0, 1, 2, 10, 299, 300]),
            "top_p": st.sampled_from([1.0, 1.0, 1e-6, 0.3, 0.95]),
            "min_p": st.sampled_from([0.0, 0.0, 0.05, 1.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.8]),
            "presence_penalty": st.sampled_from([0.0, 0.0, 1.5]),
            "frequency_penalty": st.sampled_from([0.0, 0.0, -0.5]),
            "logit_bias": st.sampled_from([(), (), ((7, 100.0),), ((0, -100.0), (299, 2.5))]),
            "num_logprobs": st.sampled_from([None, None, 0, 3]),
            "seed": st.integers(0, 2**63),
            "output_token_ids": st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6),
        }
    )


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=60)
@given(
    batch=st.lists(mixed_params(), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    logits_seed=st.integers(0, 1000),
)
def test_a_request_gets_the_same_token_alone_and_in_any_batch(
    device: str, batch: list[dict[str, Any]], dtype: torch.dtype, logits_seed: int
) -> None:
    requests = [sampled_request(f"r{row}", **params) for row, params in enumerate(batch)]
    logits = random_logits(len(batch), seed=logits_seed).to(device=device, dtype=dtype)

    together = drawn_ids(logits, requests)
    reversed_order = drawn_ids(logits.flip(0), requests[::-1])[::-1]
    alone = [drawn_ids(logits[row : row + 1], [r])[0] for row, r in enumerate(requests)]

    assert together == reversed_order == alone


@pytest.mark.parametrize("device", DEVICES)
def test_a_full_vocabulary_is_drawn_from_alike_in_any_batch(device: str) -> None:
    """Long rows, where floating-point sums would depend on the batch."""
    logits = random_logits(48, vocab_size=49_152).to(device)
    requests = [
        sampled_request(f"r{seed}", seed=seed, top_p=(1.0, 0.95, 0.5)[seed % 3], temperature=1.2)
        for seed in range(48)
    ]

    together = drawn_ids(logits, requests)

    assert together == [drawn_ids(logits[i : i + 1], [r])[0] for i, r in enumerate(requests)]
    assert together == drawn_ids(logits[:5], requests[:5]) + drawn_ids(logits[5:], requests[5:])


def test_the_sampler_leaves_the_logits_as_they_are() -> None:
    logits = random_logits(2)
    before = logits.clone()
    params: dict[str, Any] = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 1.0}
    params["logit_bias"] = ((4, 3.0),)

    drawn_ids(logits, [sampled_request("a", **params), sampled_request("b", temperature=0.5)])

    assert torch.equal(logits, before)


def test_other_seeds_and_other_positions_give_other_tokens() -> None:
    """On a flat distribution over 300 tokens, 50 draws hardly meet."""
    flat = torch.zeros(50, VOCAB_SIZE)

    of_seeds = drawn_ids(flat, [sampled_request(str(i), seed=i) for i in range(50)])
    of_positions = drawn_ids(
        flat, [sampled_request(str(i), output_token_ids=[9] * i) for i in range(50)]
    )

    assert len(set(of_seeds)) > 35
    assert len(set(of_positions)) > 35


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_temperature_top_one_and_a_tiny_temperature_take_the_most_likely(
    params: dict[str, Any], dtype: torch.dtype
) -> None:
    logits = (random_logits(20) * 10).to(dtype)
    logits[torch.arange(20), torch.arange(20)] = 1000.0

    token_ids = drawn_ids(logits, [sampled_request(str(i), seed=i, **params) for i in range(20)])

    assert token_ids == list(range(20))


def test_a_temperature_below_float32_does_not_overflow() -> None:
    assert drawn_ids(torch.tensor([[-50.0, 3.0, 2.9]]), [sampled_request(temperature=1e-60)]) == [1]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 1}])
def test_greedy_takes_the_lowest_of_equal_ids(params: dict[str, Any]) -> None:
    requests = [sampled_request(str(seed), seed=seed, **params) for seed in range(20)]

    assert drawn_ids(torch.tensor([[0.0, 5.0, 5.0, 1.0]]).expand(20, -1), requests) == [1] * 20


def test_tokens_with_no_probability_are_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(100, -1)

    token_ids = drawn_ids(logits, [sampled_request(str(seed), seed=seed) for seed in range(100)])

    assert set(token_ids) == {1, 3}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_is_added_to_the_logits_of_its_tokens(dtype: torch.dtype, device: str) -> None:
    logits = random_logits(200).to(device=device, dtype=dtype)
    biases = ((3, 2.5), (250, -1.25), (7, 100.0), (8, -100.0), (9, 99.0))
    requests = [sampled_request(str(row), seed=row, logit_bias=biases) for row in range(200)]

    token_ids = drawn_ids(logits, requests)

    scores = logits.cpu().float()
    for token_id, bias in biases:
        scores[:, token_id] += bias
    assert_drawn_by_inverse_cdf(scores.softmax(-1), token_ids, [uniform(i, 0) for i in range(200)])


def test_a_bias_concerns_its_own_request_alone_and_greedy_ones_too() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]]).expand(3, -1)
    biased = sampled_request("biased", temperature=0.0, logit_bias=((0, 100.0),))
    banned = sampled_request("banned", temperature=0.0, logit_bias=((1, -100.0),))
    plain = sampled_request("plain", temperature=0.0)

    assert drawn_ids(logits, [biased, plain, banned]) == [0, 1, 2]


def test_a_bias_comes_before_the_penalties() -> None:
    """Token 1 has (1 - 2) * 2 = -2 < -1.75; the other way round, 1 / 2 - 2 = -1.5 would win."""
    request = sampled_request(
        prompt_token_ids=[0, 1],
        temperature=0.0,
        repetition_penalty=2.0,
        logit_bias=((1, -2.0),),
    )

    assert drawn_ids(torch.tensor([[-50.0, 1.0, -1.75]]), [request]) == [2]


def test_repetition_penalty_equals_that_of_transformers() -> None:
    """It counts tokens of prompt and output once each, however often they come."""
    logits = random_logits(200)
    histories = [[row % 7, row % 11, row % 11, 250] for row in range(200)]
    requests = [
        sampled_request(
            str(row),
            prompt_token_ids=history[:2],
            output_token_ids=history[2:],
            seed=row,
            repetition_penalty=1.8,
        )
        for row, history in enumerate(histories)
    ]

    token_ids = drawn_ids(logits, requests)

    scores = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor(histories), logits.clone())
    numbers = [uniform(row, 2) for row in range(200)]
    assert_drawn_by_inverse_cdf(scores.softmax(-1), token_ids, numbers)


def test_presence_and_frequency_penalties_count_the_output_alone() -> None:
    """Token 0 was produced twice: 10 - 2 * 1.5 - 4 = 3 < 4. Token 1 is in the prompt only."""
    logits = torch.tensor([[10.0, 5.0, 4.0, 0.0]])
    greedy: dict[str, Any] = {"temperature": 0.0, "frequency_penalty": 1.5, "presence_penalty": 4.0}

    twice = sampled_request(prompt_token_ids=[1, 1], output_token_ids=[0, 0], **greedy)
    once = sampled_request(prompt_token_ids=[1, 0, 0], output_token_ids=[0], **greedy)
    twice_and_one = sampled_request(prompt_token_ids=[1, 1], output_token_ids=[0, 0, 1], **greedy)

    assert drawn_ids(logits, [twice]) == [1]
    assert drawn_ids(logits - torch.tensor([0.0, 0.6, 0.0, 0.0]), [once]) == [0]
    assert drawn_ids(logits, [twice_and_one]) == [2]


@settings(deadline=None, max_examples=40)
@given(
    output_token_ids=st.lists(st.integers(0, 20), max_size=20),
    forget_at=st.sets(st.integers(0, 20)),
)
def test_penalties_are_the_same_after_forgetting_and_resuming(
    output_token_ids: list[int], forget_at: set[int]
) -> None:
    params: dict[str, Any] = {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.3,
        "temperature": 0.0,
    }
    sampler = Sampler(VOCAB_SIZE)
    request = sampled_request(**params)
    logits = random_logits(1)
    for index, token_id in enumerate(output_token_ids):
        sampler.sample(logits, [request])
        if index in forget_at:
            sampler.forget([request.request_id, "unknown"])
        request.append_output_token(token_id, 0.0)

    continued = sampler.sample(logits, [request])

    resumed_elsewhere = sampled_request(output_token_ids=output_token_ids, **params)
    assert continued == Sampler(VOCAB_SIZE).sample(logits, [resumed_elsewhere])
    assert continued == sampler.sample(logits, [resumed_elsewhere])


def test_an_id_that_comes_back_with_another_request_starts_its_counts_anew() -> None:
    logits = torch.tensor([[5.0, 4.0]])
    sampler = Sampler(2)
    params: dict[str, Any] = {"temperature": 0.0, "presence_penalty": 2.0, "prompt_token_ids": [1]}
    sampler.sample(logits, [sampled_request("same", output_token_ids=[0, 0], **params)])

    (token,) = sampler.sample(logits, [sampled_request("same", **params)])

    assert token.token_id == 0


def test_logprobs_are_those_of_the_model_before_any_step() -> None:
    logits = random_logits(3)
    expected = logits.log_softmax(-1)
    requests = [
        sampled_request(
            "a",
            num_logprobs=4,
            temperature=0.3,
            top_k=3,
            logit_bias=((5, 7.0),),
            repetition_penalty=1.5,
            prompt_token_ids=[int(logits[0].argmax())],
        ),
        sampled_request("b", temperature=0.0),
        sampled_request("c", num_logprobs=0, temperature=0.0),
    ]

    first, second, third = Sampler(VOCAB_SIZE).sample(logits, requests)

    assert first.logprobs is not None
    assert first.logprobs.token_logprob == pytest.approx(float(expected[0, first.token_id]))
    top = expected[0].topk(4)
    assert [i for i, _ in first.logprobs.top] == top.indices.tolist()
    assert [p for _, p in first.logprobs.top] == pytest.approx(top.values.tolist())
    assert second == SampledToken(int(logits[1].argmax()), None)
    assert third.logprobs is not None
    assert third.logprobs.top == ()


def test_logprobs_name_the_greedy_token_first_among_equals() -> None:
    logits = torch.tensor([[1.0, 7.0, -3.0, 7.0, 7.0, 0.0]])

    (token,) = Sampler(6).sample(logits, [sampled_request(temperature=0.0, num_logprobs=20)])

    assert token.logprobs is not None
    assert [token_id for token_id, _ in token.logprobs.top] == [1, 3, 4, 0, 5, 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_logits_are_refused_with_the_request_named(
    bad: float, params: dict[str, Any], device: str
) -> None:
    logits = random_logits(3).to(device)
    logits[1, 17] = bad
    requests = [sampled_request(name, **params) for name in ("first", "second", "third")]

    with pytest.raises(InvalidLogits, match="second") as caught:
        Sampler(VOCAB_SIZE).sample(logits, requests)

    assert caught.value.reasons.keys() == {"second"}


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 300\), expected \(1, 300\)"):
        Sampler(VOCAB_SIZE).sample(random_logits(2), [sampled_request()])


def test_an_empty_batch_gives_nothing() -> None:
    assert Sampler(VOCAB_SIZE).sample(random_logits(0), []) == []
