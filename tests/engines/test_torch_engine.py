"""What the embedded engine has of its own: its tokens, its directories, its options.

`test_engine_contract.py` has what every engine promises, `test_smollm2_tokens.py` the real model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engines.torch_engine import TorchEngine, kv_block_bytes
from orchestrator.core.errors import EngineDirectoryError, EngineError
from orchestrator.core.request import SamplingParams
from tests.engines.step_driver import StepDriver, random_requests, tokens_alone
from tests.engines.tiny_llama import (
    hugging_face_tokens,
    tiny_config,
    tiny_engine,
    tiny_options,
    tiny_tensors,
    write_tiny_engine_dir,
)

NUM_TOKENS = 12


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("is_tied", [False, True])
def test_greedy_tokens_are_those_of_hugging_face(num_kv_heads: int, *, is_tied: bool) -> None:
    config = tiny_config(num_key_value_heads=num_kv_heads, tie_word_embeddings=is_tied)
    tensors = tiny_tensors(config)
    requests = random_requests(1, 7, 30, max_tokens=NUM_TOKENS)

    outputs = StepDriver(tiny_engine(config, tensors), *requests).run(chunk_tokens=5)

    for request in requests:
        prompt = list(request.spec.prompt_token_ids)
        expected = hugging_face_tokens(config, tensors, prompt, NUM_TOKENS)
        assert outputs[request.request_id] == expected


def test_bfloat16_log_probabilities_are_close_to_float32() -> None:
    """bfloat16 keeps 8 bits: 0.4 % per operation."""
    sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0, num_logprobs=5)
    first: dict[str, dict[int, float]] = {}
    for dtype in ("float32", "bfloat16"):
        (request,) = random_requests(20, sampling=sampling)
        output = StepDriver(tiny_engine(dtype=dtype), request).step({"20": 20})
        first[dtype] = dict(output.logprobs["20"][0].top)

    common = first["float32"].keys() & first["bfloat16"].keys()
    assert len(common) >= 3
    for token_id in common:
        assert first["bfloat16"][token_id] == pytest.approx(first["float32"][token_id], abs=0.5)


def test_an_engine_directory_runs_as_the_tensors_it_was_written_from(tmp_path: Path) -> None:
    write_tiny_engine_dir(tmp_path / "tiny")

    engine = TorchEngine.load(tmp_path / "tiny", tiny_options(max_model_len=128))

    assert tokens_alone(engine, 5, 30) == tokens_alone(tiny_engine(), 5, 30)


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
