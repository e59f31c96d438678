"""What `core.ports.Engine` promises of a step, on every engine.

`test_engine_contract_copies.py` has what it promises of KV transfers.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from orchestrator.core.errors import EngineStepError
from orchestrator.core.ports import ScheduledRequest
from orchestrator.core.request import Request, SamplingParams
from tests.engines.contract_engines import EngineMaker
from tests.engines.step_driver import StepDriver, make_plan, random_requests, tokens_alone
from tests.engines.tiny_llama import tiny_tensors
from tests.factories import make_request

# --- every engine ---------------------------------------------------------------------------


def test_each_request_that_reaches_its_last_token_gets_one_and_no_other_does(
    make_engine: EngineMaker,
) -> None:
    """`10` is whole, `20` lacks its last token; then `10` decodes and `20` is whole."""
    driver = StepDriver(make_engine(), *random_requests(10, 20))

    first = driver.step({"10": 10, "20": 19})
    second = driver.step({"10": 1, "20": 1})

    assert {name: len(tokens) for name, tokens in first.new_token_ids.items()} == {"10": 1}
    assert {name: len(t) for name, t in second.new_token_ids.items()} == {"10": 1, "20": 1}
    assert first.failed == second.failed == {}


def test_an_empty_plan_gives_an_empty_output(make_engine: EngineMaker) -> None:
    output = make_engine().step(make_plan(step_id=7, finished_ids=("gone", "never seen")))

    assert (output.step_id, output.new_token_ids, output.failed) == (7, {}, {})
    assert (output.completed_transfers, output.failed_transfers) == ((), {})


def test_equal_plans_give_equal_tokens(make_engine: EngineMaker) -> None:
    sampling = SamplingParams(max_tokens=12, seed=3, temperature=0.9)
    outputs = [
        StepDriver(make_engine(), *random_requests(5, 9, 30, sampling=sampling)).run(chunk_tokens=7)
        for _ in range(2)
    ]

    assert outputs[0] == outputs[1]


def test_capabilities_are_those_asked_for_and_stay(make_engine: EngineMaker) -> None:
    limits: dict[str, Any] = {
        "num_device_blocks": 40,
        "num_host_blocks": 7,
        "max_num_batched_tokens": 33,
        "max_num_seqs": 3,
        "max_model_len": 50,
    }
    engine = make_engine(**limits)
    before = engine.capabilities

    StepDriver(engine, *random_requests(5)).run(chunk_tokens=7)

    assert engine.capabilities == before
    assert {name: getattr(before, name) for name in limits} == limits


# --- engines that compute tokens ------------------------------------------------------------


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 16, 100])
def test_tokens_do_not_depend_on_chunks_or_on_the_rest_of_the_batch(
    make_model_engine: EngineMaker, chunk_tokens: int
) -> None:
    """Lengths around block boundaries of 4. With chunks of 1, a prompt is computed by decodes."""
    lengths = (1, 3, 4, 5, 8, 17, 33)
    engine = make_model_engine()

    outputs = StepDriver(engine, *random_requests(*lengths)).run(chunk_tokens=chunk_tokens)

    make_model_engine.assert_same_tokens(outputs, tokens_alone(engine, *lengths))


def test_one_long_context_decodes_correctly_beside_many_short_ones(
    make_model_engine: EngineMaker,
) -> None:
    """200 tokens are 50 blocks, 2 tokens are one."""
    lengths = (2, 3, 60, 200)
    engine = make_model_engine()

    outputs = StepDriver(engine, *random_requests(*lengths)).run(chunk_tokens=64)

    make_model_engine.assert_same_tokens(outputs, tokens_alone(engine, *lengths))


def test_preemption_by_recompute_does_not_change_tokens(make_model_engine: EngineMaker) -> None:
    """Both lose their blocks at different moments; one comes back in chunks of 5 while the
    other decodes."""
    engine = make_model_engine()
    driver = StepDriver(engine, *random_requests(9, 21))
    driver.step({"9": 9, "21": 4})
    for _ in range(5):
        driver.step({"9": 1, "21": 7})

    driver.preempt("9")
    driver.step({"21": 1})
    driver.preempt("21")

    outputs = driver.run(chunk_tokens=5)
    make_model_engine.assert_same_tokens(outputs, tokens_alone(engine, 9, 21))


def test_a_random_interleaving_of_everything_does_not_change_tokens(
    make_model_engine: EngineMaker,
) -> None:
    lengths = (1, 2, 6, 11, 16, 25, 40, 64)
    engine = make_model_engine()
    driver = StepDriver(engine, *random_requests(*lengths))
    generator = random.Random(1)
    while names := driver.unfinished():
        if generator.random() < 0.1:
            driver.preempt(generator.choice(names))
        chosen = generator.sample(names, generator.randint(1, len(names)))
        driver.step({name: generator.choice([1, 2, 7, 20]) for name in chosen})

    make_model_engine.assert_same_tokens(driver.outputs(), tokens_alone(engine, *lengths))


@pytest.mark.tiny_model
def test_a_seeded_request_draws_the_same_alone_and_in_a_batch(
    make_model_engine: EngineMaker,
) -> None:
    sampling = SamplingParams(max_tokens=12, seed=5, temperature=0.8, top_p=0.9)
    engine = make_model_engine()
    (alone,) = random_requests(9, sampling=sampling)
    expected = StepDriver(engine, alone).run(chunk_tokens=100)["9"]

    together = StepDriver(engine, *random_requests(9, 17, 30, sampling=sampling))

    assert together.run(chunk_tokens=4)["9"] == expected
    assert expected != tokens_alone(engine, 9)["9"]


def test_log_probabilities_come_with_each_token_for_those_who_asked(
    make_model_engine: EngineMaker,
) -> None:
    asked = SamplingParams(max_tokens=2, seed=0, temperature=0.0, num_logprobs=3)
    (eager,) = random_requests(6, sampling=asked)
    (plain,) = random_requests(9)
    driver = StepDriver(make_model_engine(), plain, eager)

    output = driver.step({"9": 9, "6": 6})

    assert output.logprobs.keys() == {"6"}
    (logprobs,) = output.logprobs["6"]
    assert logprobs.top[0] == (output.new_token_ids["6"][0], logprobs.token_logprob)
    assert len(logprobs.top) == 3


def test_a_finished_id_may_come_back_as_another_request(make_model_engine: EngineMaker) -> None:
    """Its penalties count its own tokens, not those of its namesake."""
    sampling = SamplingParams(max_tokens=8, seed=0, temperature=0.0, repetition_penalty=1.8)

    def namesake(length: int) -> Request:
        (request,) = random_requests(length, sampling=sampling)
        return make_request("r", prompt_token_ids=request.spec.prompt_token_ids, sampling=sampling)

    expected = StepDriver(make_model_engine(), namesake(20)).run(chunk_tokens=100)
    engine = make_model_engine()
    StepDriver(engine, namesake(7)).run(chunk_tokens=100)
    engine.step(make_plan(finished_ids=("r",)))

    assert StepDriver(engine, namesake(20)).run(chunk_tokens=100) == expected


def scheduled(
    request_id: str = "bad", *, start: int = 0, count: int = 10, blocks: tuple[int, ...] = (0, 1, 2)
) -> ScheduledRequest:
    request = make_request(request_id, num_prompt_tokens=10)
    return ScheduledRequest(request, start, count, blocks)


@pytest.mark.tiny_model
@pytest.mark.parametrize(
    ("part", "message"),
    [
        (scheduled(count=0), r"request bad is scheduled with tokens \[0, 0\) of 10"),
        (scheduled(start=-1), r"tokens \[-1, 9\) of 10"),
        (scheduled(start=5), r"tokens \[5, 15\) of 10"),
        (scheduled(blocks=(0, 1)), "10 tokens in 2 blocks, which hold 8"),
        (scheduled(blocks=(0, 1, 16)), "a block outside of the pool's 16"),
        (scheduled(blocks=(0, -1, 2)), "a block outside of the pool's 16"),
        (scheduled("good"), "scheduled twice"),
    ],
)
def test_a_plan_that_breaks_the_contract_fails_and_names_all_its_requests(
    make_model_engine: EngineMaker, part: ScheduledRequest, message: str
) -> None:
    """Nothing of such a step can be trusted, so the request beside the bad one fails too."""
    engine = make_model_engine(num_device_blocks=16)

    with pytest.raises(EngineStepError, match=message) as caught:
        engine.step(make_plan(scheduled("good", blocks=(3, 4, 5)), part))

    assert caught.value.request_ids == ("good", part.request_id)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_num_seqs": 1}, "2 requests in one step, max_num_seqs 1"),
        ({"max_num_batched_tokens": 19}, "20 new tokens in one step, max_num_batched_tokens 19"),
        ({"max_model_len": 9}, "10 tokens, max_model_len 9"),
    ],
)
def test_a_plan_over_a_limit_is_refused(
    make_model_engine: EngineMaker, limits: dict[str, Any], message: str
) -> None:
    engine = make_model_engine(**limits)

    with pytest.raises(EngineStepError, match=message):
        engine.step(make_plan(scheduled("a"), scheduled("b", blocks=(3, 4, 5))))


def test_a_plan_at_all_limits_is_computed(make_model_engine: EngineMaker) -> None:
    engine = make_model_engine(
        num_device_blocks=6, max_num_seqs=2, max_num_batched_tokens=20, max_model_len=10
    )

    output = engine.step(make_plan(scheduled("a"), scheduled("b", blocks=(3, 4, 5))))

    assert output.new_token_ids.keys() == {"a", "b"}


def test_the_engine_goes_on_after_a_failed_step(make_model_engine: EngineMaker) -> None:
    engine = make_model_engine()
    expected = tokens_alone(engine, 10)
    with pytest.raises(EngineStepError):
        engine.step(make_plan(scheduled(blocks=())))

    assert tokens_alone(engine, 10) == expected


@pytest.mark.tiny_model
@pytest.mark.parametrize("token_id", [-1, 97])
def test_a_request_with_a_token_outside_of_the_vocabulary_fails_alone(
    make_model_engine: EngineMaker, token_id: int
) -> None:
    engine = make_model_engine()
    (good,) = random_requests(6)
    bad = make_request("bad", prompt_token_ids=[1, token_id, 2])

    output = StepDriver(engine, bad, good).step({"bad": 3, "6": 6})

    assert output.failed == {"bad": "the request holds token ids outside of [0, 97)"}
    assert output.new_token_ids["6"] == (tokens_alone(engine, 6)["6"][0],)


@pytest.mark.tiny_model
def test_a_request_that_biases_a_foreign_token_fails_alone(make_model_engine: EngineMaker) -> None:
    engine = make_model_engine()
    (good,) = random_requests(6)
    sampling = SamplingParams(max_tokens=8, seed=0, logit_bias=((97, 1.0),))
    bad = make_request("bad", prompt_token_ids=[1, 2], sampling=sampling)

    output = StepDriver(engine, bad, good).step({"bad": 2, "6": 6})

    assert output.failed == {"bad": "the request holds token ids outside of [0, 97)"}
    assert output.new_token_ids["6"] == (tokens_alone(engine, 6)["6"][0],)


@pytest.mark.tiny_model
def test_a_bias_decides_which_token_an_engine_chooses(make_model_engine: EngineMaker) -> None:
    sampling = SamplingParams(max_tokens=8, seed=0, temperature=0.0, logit_bias=((41, 100.0),))
    request = make_request("r", prompt_token_ids=[1, 2], sampling=sampling)

    output = StepDriver(make_model_engine(), request).step({"r": 2})

    assert output.new_token_ids == {"r": (41,)}


@pytest.mark.tiny_model
def test_a_request_whose_logits_are_not_numbers_fails_alone(
    make_model_engine: EngineMaker,
) -> None:
    """Token 50 has an embedding of NaN; only one prompt holds it."""
    tensors = tiny_tensors(make_model_engine.config)
    tensors["model.embed_tokens.weight"][50] = torch.nan
    engine = make_model_engine(tensors=tensors)
    good = make_request("good", prompt_token_ids=[3, 1, 4])
    bad = make_request("bad", prompt_token_ids=[1, 50, 2])

    output = StepDriver(engine, bad, good).step({"bad": 3, "good": 3})

    assert output.failed.keys() == {"bad"}
    assert output.new_token_ids.keys() == {"good"}
