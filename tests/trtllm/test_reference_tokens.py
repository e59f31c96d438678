"""The stand-ins' tokens, of well-packed steps: the embedded engine's for a llama, known ones for a
fake. Blocks lie scattered in a pool of garbage."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from engines.torch_engine.config import LlamaConfig
from tests.engines.step_driver import StepDriver
from tests.engines.tiny_llama import tiny_config, tiny_engine, tiny_tensors
from tests.factories import make_request
from tests.trtllm.engine_spec import EngineSpec, engine_bytes
from tests.trtllm.fake_model import FakeModel
from tests.trtllm.reference_engine import fake_spec, llama_spec
from tests.trtllm.session_driver import SessionDriver

pytestmark = pytest.mark.usefixtures("stand_ins")

NUM_TOKENS = 8
LENGTHS = (1, 3, 4, 5, 8, 17, 33)
"""Around block boundaries of 4."""


def prompts(*lengths: int) -> dict[str, list[int]]:
    draw = random.Random(0)
    return {str(length): [draw.randrange(97) for _ in range(length)] for length in lengths}


def embedded_tokens(config: LlamaConfig, *lengths: int) -> dict[str, list[int]]:
    engine = tiny_engine(config)
    outputs: dict[str, list[int]] = {}
    for name, prompt in prompts(*lengths).items():
        request = make_request(name, prompt_token_ids=prompt, max_tokens=NUM_TOKENS)
        outputs |= StepDriver(engine, request).run(chunk_tokens=256)
    return outputs


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 100])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_a_llama_gives_the_tokens_of_the_embedded_engine(
    num_kv_heads: int, chunk_tokens: int
) -> None:
    """Requests join step by step, so that contexts and generations share steps."""
    config = tiny_config(num_key_value_heads=num_kv_heads)
    spec = llama_spec(config, tokens_per_block=4)
    content = engine_bytes(spec, tiny_tensors(config))

    driver = SessionDriver(content, spec, prompts(*LENGTHS))

    assert driver.run(NUM_TOKENS, chunk_tokens=chunk_tokens) == embedded_tokens(config, *LENGTHS)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4, 100])
@pytest.mark.parametrize(
    "spec",
    [
        fake_spec(),
        fake_spec(num_layers=1, num_kv_heads_per_rank=1, tokens_per_block=1),
        fake_spec(head_size=16, tokens_per_block=8, dtype="bfloat16"),
        replace(fake_spec(head_size=24), kv_cache_dtype="int8", logits_dtype="float16"),
        fake_spec(vocab_size=97, tp_size=2),
        replace(fake_spec(), has_position_ids=False),
    ],
)
def test_a_fake_gives_the_tokens_that_it_computes_without_a_pool(
    spec: EngineSpec, chunk_tokens: int
) -> None:
    model = FakeModel(spec)

    outputs = SessionDriver(engine_bytes(spec), spec, prompts(*LENGTHS)).run(
        NUM_TOKENS, chunk_tokens=chunk_tokens
    )

    assert outputs == {
        name: model.tokens(prompt, NUM_TOKENS) for name, prompt in prompts(*LENGTHS).items()
    }


def test_a_shared_full_block_is_read_by_both() -> None:
    """Both prompts begin with the same 8 tokens: two blocks that the second does not compute."""
    spec = fake_spec()
    beginning = prompts(8)["8"]
    texts = {"first": [*beginning, 1, 2, 3], "second": [*beginning, 4, 5]}
    driver = SessionDriver(engine_bytes(spec), spec, texts)
    driver.step({"first": 11})
    driver.blocks["second"] = driver.blocks["first"][:2]
    driver.num_computed["second"] = 8

    driver.step({"first": 1, "second": 2})

    model = FakeModel(spec)
    assert driver.outputs() == {
        "first": model.tokens(texts["first"], 2),
        "second": model.tokens(texts["second"], 1),
    }


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("key_or_value", [0, 1])
@pytest.mark.parametrize("head", [0, 1])
@pytest.mark.parametrize("slot", [0, 3])
def test_one_wrong_number_anywhere_in_the_context_changes_a_fakes_logits(
    layer: int, key_or_value: int, head: int, slot: int
) -> None:
    """A bit of the first block's memory flips between the prompt and its first output token."""
    spec = fake_spec()
    driver = SessionDriver(engine_bytes(spec), spec, prompts(8))
    driver.step({"8": 8})
    block = driver.blocks["8"][0]

    driver.pool.view(torch.uint8)[block, layer, key_or_value, head, slot, 17] ^= 1
    driver.step({"8": 1})

    right = FakeModel(spec).tokens(prompts(8)["8"], 2)
    assert driver.outputs()["8"][0] == right[0]
    assert driver.outputs()["8"][1] != right[1]


def test_two_ranks_of_a_fake_give_the_same_logits() -> None:
    ranks = [replace(fake_spec(tp_size=2), rank=rank) for rank in (0, 1)]

    outputs = [
        SessionDriver(engine_bytes(spec), spec, prompts(17)).run(4, chunk_tokens=5)
        for spec in ranks
    ]

    assert outputs[0] == outputs[1]


def test_a_llama_of_several_ranks_is_refused() -> None:
    from tensorrt_llm.runtime import Session

    config = tiny_config()
    spec = replace(llama_spec(config, tokens_per_block=4), tp_size=2)

    with pytest.raises(ValueError, match=r"tp_size 2 .* use a fake engine for several ranks"):
        Session.from_serialized_engine(engine_bytes(spec, tiny_tensors(config)))


def test_a_fake_whose_rows_hold_no_hash_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 bytes a token, .* multiple of 8; change head_size"):
        FakeModel(fake_spec(head_size=1))


def test_other_engine_files_are_no_engine_as_in_tensorrt() -> None:
    import tensorrt as trt
    from tensorrt_llm.runtime import Session

    content = b"ftrt" + bytes(100)

    assert trt.Runtime(trt.Logger()).deserialize_cuda_engine(content) is None
    with pytest.raises(AttributeError, match="create_execution_context"):
        Session.from_serialized_engine(content)
