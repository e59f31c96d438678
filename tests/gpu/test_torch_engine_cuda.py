from __future__ import annotations

import random

import pytest

from tests.engines.step_driver import StepDriver
from tests.engines.tiny_llama import tiny_engine
from tests.factories import make_request

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("chunk_tokens", [7, 256])
def test_tokens_on_cuda_are_those_of_the_cpu(chunk_tokens: int) -> None:
    """Both in float32; PyTorch leaves TF32 off unless told otherwise."""
    generator = random.Random(0)
    prompts = {
        str(length): [generator.randrange(97) for _ in range(length)]
        for length in (1, 5, 16, 60, 120)
    }

    outputs = {}
    for device in ("cpu", "cuda"):
        requests = [
            make_request(name, prompt_token_ids=prompt, max_tokens=16)
            for name, prompt in prompts.items()
        ]
        engine = tiny_engine(device=device)
        outputs[device] = StepDriver(engine, *requests).run(chunk_tokens=chunk_tokens)
        engine.close()

    assert outputs["cuda"] == outputs["cpu"]


def test_bfloat16_runs_on_cuda() -> None:
    engine = tiny_engine(device="cuda", dtype="bfloat16")

    outputs = StepDriver(engine, make_request(num_prompt_tokens=20)).run(chunk_tokens=8)

    assert len(outputs["r"]) == 8
