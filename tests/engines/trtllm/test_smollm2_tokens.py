"""The real small model: greedy tokens of the TensorRT-LLM path, over the reference engine, against
those of the embedded engine, which `tests/engines/test_smollm2_tokens.py` compares with Hugging
Face's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from engines.torch_engine import TorchEngine, TorchEngineOptions
from engines.trtllm.engine import TrtLlmEngine
from orchestrator.core.request import Request
from tests.engines.step_driver import StepDriver
from tests.engines.trtllm.fake_engines import make_options
from tests.factories import make_request
from tests.trtllm.reference_engine import write_llama_engine
from tests.trtllm.stand_in_path import stand_ins_importable

pytestmark = pytest.mark.slow

NUM_TOKENS = 16
PROMPTS = (
    "The",
    "def fibonacci(n):\n    ",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "The quick brown fox jumps over the lazy dog. " * 7,
)


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> None:
    """Tests of small models leave PyTorch at one thread."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


@pytest.fixture(scope="module")
def prompts(smollm2_dir: Path) -> dict[str, list[int]]:
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    return {f"{index}": tokenizer.encode(text).ids for index, text in enumerate(PROMPTS)}


@pytest.fixture(scope="module")
def expected(smollm2_dir: Path, prompts: Mapping[str, list[int]]) -> dict[str, list[int]]:
    engine = TorchEngine.load(
        smollm2_dir,
        TorchEngineOptions(
            device="cpu",
            dtype="float32",
            num_device_blocks=100,
            max_num_batched_tokens=512,
            max_num_seqs=8,
            max_model_len=512,
        ),
    )
    outputs = StepDriver(engine, *make_requests(prompts)).run(chunk_tokens=512)
    engine.close()
    return outputs


@pytest.fixture(scope="module")
def engine(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrtLlmEngine]:
    engine_dir = tmp_path_factory.mktemp("reference") / "smollm2"
    write_llama_engine(engine_dir, smollm2_dir)
    with stand_ins_importable():
        engine = TrtLlmEngine(
            engine_dir,
            make_options(
                num_device_blocks=100,
                num_host_blocks=100,
                max_num_batched_tokens=512,
                max_num_seqs=8,
                max_model_len=512,
            ),
        )
        yield engine
        engine.close()


def make_requests(prompts: Mapping[str, list[int]]) -> list[Request]:
    return [
        make_request(name, prompt_token_ids=prompt, max_tokens=NUM_TOKENS)
        for name, prompt in prompts.items()
    ]


def test_alone(
    engine: TrtLlmEngine, prompts: Mapping[str, list[int]], expected: Mapping[str, list[int]]
) -> None:
    for request in make_requests(prompts):
        outputs = StepDriver(engine, request).run(chunk_tokens=512)

        assert outputs[request.request_id] == expected[request.request_id]


def test_in_mixed_batches_with_chunked_prefill(
    engine: TrtLlmEngine, prompts: Mapping[str, list[int]], expected: Mapping[str, list[int]]
) -> None:
    """In chunks of 7: short prompts decode long before the long one is through."""
    assert StepDriver(engine, *make_requests(prompts)).run(chunk_tokens=7) == expected


def test_after_preemption_by_recompute(
    engine: TrtLlmEngine, prompts: Mapping[str, list[int]], expected: Mapping[str, list[int]]
) -> None:
    """Every request loses its blocks once, at another step each."""
    driver = StepDriver(engine, *make_requests(prompts))
    for name in prompts:
        driver.step(dict.fromkeys(driver.unfinished(), 24))
        driver.preempt(name)

    assert driver.run(chunk_tokens=48) == expected


def test_after_offload_and_reload(
    engine: TrtLlmEngine, prompts: Mapping[str, list[int]], expected: Mapping[str, list[int]]
) -> None:
    """Every request with a full block leaves the device once, while the others go on; what it
    had there is overwritten before it comes back."""
    driver = StepDriver(engine, *make_requests(prompts))
    driver.step(dict.fromkeys(driver.requests, 128))
    for name in prompts:
        others = [other for other in driver.unfinished() if other != name]
        transfer = driver.offload(name) if driver.requests[name].num_computed_tokens >= 16 else None
        output = driver.step(dict.fromkeys(others, 1), transfers=[transfer] if transfer else [])
        while transfer and transfer.transfer_id not in output.completed_transfers:
            output = driver.step({})
        driver.preempt(name)
        driver.step(dict.fromkeys(others, 1))
        onboards = [driver.onboard(name)] if transfer else []
        driver.step({name: 24}, transfers=onboards)

    assert driver.run(chunk_tokens=48) == expected
