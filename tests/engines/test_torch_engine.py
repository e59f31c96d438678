"""The decoder over random weights: what a step promises, in seconds rather than minutes.

`test_smollm2_tokens.py` has the same promises over the real model.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.torch_engine import TorchEngine, kv_block_bytes
from orchestrator.core.errors import EngineDirectoryError, EngineError, EngineStepError
from orchestrator.core.ports import ScheduledRequest
from orchestrator.core.request import Request, SamplingParams
from tests.engines.step_driver import StepDriver, make_plan
from tests.engines.tiny_llama import (
    hugging_face_tokens,
    tiny_config,
    tiny_engine,
    tiny_options,
    tiny_tensors,
    write_tiny_engine_dir,
)
from tests.factories import make_request

NUM_TOKENS = 12


def make_requests(*prompt_lengths: int, **arguments: Any) -> list[Request]:
    """Named by their prompt's length, with random prompts."""
    generator = random.Random(0)
    return [
        make_request(
            str(length),
            prompt_token_ids=[generator.randrange(97) for _ in range(length)],
            max_tokens=NUM_TOKENS,
            **arguments,
        )
        for length in prompt_lengths
    ]


def tokens_alone(*prompt_lengths: int, engine: TorchEngine) -> dict[str, list[int]]:
    """Return each request's tokens when it runs alone, its prompt in one piece."""
    outputs: dict[str, list[int]] = {}
    for request in make_requests(*prompt_lengths):
        outputs |= StepDriver(engine, request).run(chunk_tokens=256)
    return outputs


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("is_tied", [False, True])
def test_greedy_tokens_are_those_of_hugging_face(num_kv_heads: int, *, is_tied: bool) -> None:
    config = tiny_config(num_key_value_heads=num_kv_heads, tie_word_embeddings=is_tied)
    tensors = tiny_tensors(config)
    requests = make_requests(1, 7, 30)

    outputs = StepDriver(tiny_engine(config, tensors), *requests).run(chunk_tokens=5)

    for request in requests:
        prompt = list(request.spec.prompt_token_ids)
        expected = hugging_face_tokens(config, tensors, prompt, NUM_TOKENS)
        assert outputs[request.request_id] == expected


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 16, 100])
def test_tokens_do_not_depend_on_chunks_or_on_the_rest_of_the_batch(chunk_tokens: int) -> None:
    """Lengths around block boundaries of 4. With chunks of 1, a prompt is computed by decodes."""
    lengths = (1, 3, 4, 5, 8, 17, 33)
    engine = tiny_engine()

    outputs = StepDriver(engine, *make_requests(*lengths)).run(chunk_tokens=chunk_tokens)

    assert outputs == tokens_alone(*lengths, engine=engine)


def test_one_long_context_decodes_correctly_beside_many_short_ones() -> None:
    """200 tokens are 50 blocks, 2 tokens are one: three groups of decodes in one step."""
    lengths = (2, 3, 60, 200)
    engine = tiny_engine()

    outputs = StepDriver(engine, *make_requests(*lengths)).run(chunk_tokens=64)

    assert outputs == tokens_alone(*lengths, engine=engine)


def test_preemption_by_recompute_does_not_change_tokens() -> None:
    """Both lose their blocks at different moments; one comes back in chunks of 5 while the
    other decodes."""
    engine = tiny_engine()
    driver = StepDriver(engine, *make_requests(9, 21))
    driver.step({"9": 9, "21": 4})
    for _ in range(5):
        driver.step({"9": 1, "21": 7})

    driver.preempt("9")
    driver.step({"21": 1})
    driver.preempt("21")

    assert driver.run(chunk_tokens=5) == tokens_alone(9, 21, engine=engine)


def test_a_random_interleaving_of_everything_does_not_change_tokens() -> None:
    lengths = (1, 2, 6, 11, 16, 25, 40, 64)
    engine = tiny_engine()
    driver = StepDriver(engine, *make_requests(*lengths))
    generator = random.Random(1)
    while names := driver.unfinished():
        if generator.random() < 0.1:
            driver.preempt(generator.choice(names))
        chosen = generator.sample(names, generator.randint(1, len(names)))
        driver.step({name: generator.choice([1, 2, 7, 20]) for name in chosen})

    assert driver.outputs() == tokens_alone(*lengths, engine=engine)


def test_bfloat16_log_probabilities_are_close_to_float32() -> None:
    """bfloat16 keeps 8 bits: 0.4 % per operation."""
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, num_logprobs=5)
    first: dict[str, dict[int, float]] = {}
    for dtype in ("float32", "bfloat16"):
        (request,) = make_requests(20, sampling=sampling)
        output = StepDriver(tiny_engine(dtype=dtype), request).step({"20": 20})
        first[dtype] = dict(output.logprobs["20"][0].top)

    common = first["float32"].keys() & first["bfloat16"].keys()
    assert len(common) >= 3
    for token_id in common:
        assert first["bfloat16"][token_id] == pytest.approx(first["float32"][token_id], abs=0.5)


def test_only_requests_that_reach_their_last_token_get_a_new_one() -> None:
    driver = StepDriver(tiny_engine(), *make_requests(10, 20))

    output = driver.step({"10": 10, "20": 19})

    assert output.new_token_ids.keys() == {"10"}


def test_an_empty_plan_gives_an_empty_output() -> None:
    output = tiny_engine().step(make_plan(step_id=7, finished_ids=("gone", "never seen")))

    assert (output.step_id, output.new_token_ids, output.failed) == (7, {}, {})


def scheduled(
    request_id: str = "bad", *, start: int = 0, count: int = 10, blocks: tuple[int, ...] = (0, 1, 2)
) -> ScheduledRequest:
    request = make_request(request_id, num_prompt_tokens=10)
    return ScheduledRequest(request, start, count, blocks)


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
    part: ScheduledRequest, message: str
) -> None:
    """Nothing of such a step can be trusted, so the request beside the bad one fails too."""
    engine = tiny_engine(num_device_blocks=16)

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
def test_a_plan_over_a_limit_is_refused(limits: dict[str, Any], message: str) -> None:
    engine = tiny_engine(**limits)

    with pytest.raises(EngineStepError, match=message):
        engine.step(make_plan(scheduled("a"), scheduled("b", blocks=(3, 4, 5))))


def test_the_engine_goes_on_after_a_failed_step() -> None:
    engine = tiny_engine()
    expected = tokens_alone(10, engine=engine)
    with pytest.raises(EngineStepError):
        engine.step(make_plan(scheduled(blocks=())))

    assert tokens_alone(10, engine=engine) == expected


@pytest.mark.parametrize("token_id", [-1, 97])
def test_a_request_with_a_token_outside_of_the_vocabulary_fails_alone(token_id: int) -> None:
    engine = tiny_engine()
    (good,) = make_requests(6)
    bad = make_request("bad", prompt_token_ids=[1, token_id, 2])

    output = StepDriver(engine, bad, good).step({"bad": 3, "6": 6})

    assert output.failed == {"bad": "the request holds token ids outside of [0, 97)"}
    assert output.new_token_ids["6"] == (tokens_alone(6, engine=engine)["6"][0],)


def test_a_request_whose_logits_are_not_numbers_fails_alone() -> None:
    """Token 50 has an embedding of NaN; only one prompt holds it."""
    config = tiny_config()
    tensors = tiny_tensors(config)
    tensors["model.embed_tokens.weight"][50] = torch.nan
    engine = tiny_engine(config, tensors)
    good = make_request("good", prompt_token_ids=[3, 1, 4])
    bad = make_request("bad", prompt_token_ids=[1, 50, 2])

    output = StepDriver(engine, bad, good).step({"bad": 3, "good": 3})

    assert output.failed.keys() == {"bad"}
    assert output.new_token_ids.keys() == {"good"}


def test_an_engine_directory_runs_as_the_tensors_it_was_written_from(tmp_path: Path) -> None:
    write_tiny_engine_dir(tmp_path / "tiny")

    engine = TorchEngine.load(tmp_path / "tiny", tiny_options(max_model_len=128))

    assert tokens_alone(5, 30, engine=engine) == tokens_alone(5, 30, engine=tiny_engine())


def test_kv_block_size_is_known_before_loading(tmp_path: Path) -> None:
    """2 layers x 2 x 2 heads x 4 tokens x 8 numbers x 2 bytes."""
    write_tiny_engine_dir(tmp_path / "tiny")

    assert kv_block_bytes(tmp_path / "tiny", "bfloat16") == 512


def test_options_that_exceed_the_directory_are_refused(tmp_path: Path) -> None:
    write_tiny_engine_dir(tmp_path / "tiny")

    with pytest.raises(EngineError, match=r"max_model_len is 129, .* built for 128 at most"):
        TorchEngine.load(tmp_path / "tiny", tiny_options(max_model_len=129))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 257}, "the model takes 256 tokens at most"),
        ({"num_device_blocks": 0}, "num_device_blocks is 0, it must be at least 1"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        tiny_engine(**changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(EngineError, match="sees no CUDA device"):
        tiny_engine(device="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "missing or not part of the model.*model.norm.weight"),
        ({"lm_head.bias": torch.zeros(97)}, "missing or not part of the model.*lm_head.bias"),
        ({"model.norm.weight": torch.zeros(47)}, r"model.norm.weight has shape \(47,\)"),
    ],
)
def test_tensors_of_another_model_are_refused(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors = tiny_tensors(tiny_config()) | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}

    with pytest.raises(EngineDirectoryError, match=message):
        tiny_engine(tensors=kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling is .*runs None only"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"head_dim": None}, "head_dim is missing"),
        ({"hidden_size": "wide"}, "wide"),
        ({"num_key_value_heads": 4}, "6 attention heads cannot share 4"),
    ],
)
def test_an_architecture_that_would_be_computed_wrongly_is_refused(
    change: dict[str, Any], message: str
) -> None:
    values = tiny_config().to_dict() | change
    kept = {key: value for key, value in values.items() if value is not None}

    with pytest.raises(EngineDirectoryError, match=message):
        type(tiny_config()).from_dict(kept)
