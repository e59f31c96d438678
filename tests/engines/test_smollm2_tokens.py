"""The real model's greedy tokens against Hugging Face transformers, on the same float32 weights.

20 prompts of different kind and length, 64 tokens each. The reference is computed once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from engines.torch_engine import TorchEngine, TorchEngineOptions
from orchestrator.core.request import Request
from tests.engines.step_driver import StepDriver
from tests.factories import make_request

pytestmark = pytest.mark.slow

NUM_TOKENS = 64

CHAT_PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child in two sentences.",
    "List three prime numbers above 50.",
    "Translate 'good morning' to Spanish.",
    "Why is the sky blue?",
)
PLAIN_PROMPTS = (
    "Once upon a time",
    "The",
    "1 2 3 4 5 6 7",
    "def fibonacci(n):\n    ",
    "SELECT name, COUNT(*) FROM orders\nWHERE",
    '{"name": "Ada", "born": 1815, "tags": [',
    "Die Hauptstadt von Deutschland ist",
    "人工智能是",
    "😀 😃 😄",
    "Q: What is 12 * 12?\nA:",
    "# Installation\n\nFirst, install the package:\n\n```bash\n",
    "    \n\n\t  indented    text   with   spaces",
    "It was the best of times, it was the worst of times, it was the age of wisdom, " * 4,
    "The quick brown fox jumps over the lazy dog. " * 18,
)


@pytest.fixture(scope="module")
def prompts(smollm2_dir: Path) -> dict[str, list[int]]:
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    chat = (f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in CHAT_PROMPTS)
    texts = [*chat, *PLAIN_PROMPTS]
    return {f"{index:02}": tokenizer.encode(text).ids for index, text in enumerate(texts)}


@pytest.fixture(scope="module")
def reference(
    smollm2_dir: Path,
    prompts: Mapping[str, list[int]],
) -> dict[str, list[int]]:
    """What `LlamaForCausalLM` generates; it reads the directory's own files."""
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    model.train(mode=False)
    longest = max(len(prompt) for prompt in prompts.values())
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts.values()])
    is_token = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts.values()]
    )
    outputs = model.generate(
        input_ids=padded,
        attention_mask=is_token,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    generated: list[list[int]] = outputs[:, longest:].tolist()
    return dict(zip(prompts, generated, strict=True))


@pytest.fixture(scope="module")
def engine(smollm2_dir: Path) -> TorchEngine:
    return TorchEngine.load(
        smollm2_dir,
        TorchEngineOptions(
            device="cpu",
            dtype="float32",
            num_device_blocks=400,
            max_num_batched_tokens=2048,
            max_num_seqs=32,
            max_model_len=2048,
        ),
    )


def make_requests(prompts: Mapping[str, list[int]]) -> list[Request]:
    return [
        make_request(name, prompt_token_ids=prompt, max_tokens=NUM_TOKENS)
        for name, prompt in prompts.items()
    ]


def test_there_are_twenty_prompts_from_one_token_to_hundreds(
    prompts: Mapping[str, list[int]],
) -> None:
    lengths = sorted(len(prompt) for prompt in prompts.values())

    assert len(lengths) == 20
    assert lengths[0] == 1
    assert lengths[-1] > 150


def test_tokens_alone_are_those_of_hugging_face(
    engine: TorchEngine,
    prompts: Mapping[str, list[int]],
    reference: Mapping[str, list[int]],
) -> None:
    for request in make_requests(prompts):
        outputs = StepDriver(engine, request).run(chunk_tokens=2048)

        assert outputs[request.request_id] == reference[request.request_id]


def test_tokens_in_mixed_batches_with_chunked_prefill_are_those_of_hugging_face(
    engine: TorchEngine,
    prompts: Mapping[str, list[int]],
    reference: Mapping[str, list[int]],
) -> None:
    """Prompts in chunks of 24: the short ones decode long before the long ones are through."""
    outputs = StepDriver(engine, *make_requests(prompts)).run(chunk_tokens=24)

    assert outputs == reference


def test_tokens_after_preemption_by_recompute_are_those_of_hugging_face(
    engine: TorchEngine,
    prompts: Mapping[str, list[int]],
    reference: Mapping[str, list[int]],
) -> None:
    """Every request loses its blocks once, at another step each, some before their first token."""
    driver = StepDriver(engine, *make_requests(prompts))
    for name in prompts:
        for _ in range(2):
            driver.step(dict.fromkeys(driver.unfinished(), 48))
        driver.preempt(name)

    assert driver.run(chunk_tokens=48) == reference


def test_the_directory_names_the_tokens_that_end_a_generation(smollm2_dir: Path) -> None:
    config = json.loads((smollm2_dir / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))

    assert [tokenizer.id_to_token(token_id) for token_id in config["eos_token_id"]] == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
