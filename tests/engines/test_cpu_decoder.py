"""The CPU decoder against the readable one, and against itself in other company."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from engines.kv_pool import KVPool
from engines.torch_engine import TorchEngine, TorchEngineOptions, cpu_library
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.cpu_decoder import CpuDecoder
from engines.torch_engine.cpu_weights import quantize
from engines.torch_engine.engine import Decoder, PlainDecoder
from engines.torch_engine.model import LlamaDecoder
from engines.torch_engine.precision import resolve_dtype
from engines.torch_engine.weights import DecoderWeights, fuse_weights
from orchestrator.core.errors import EngineError
from orchestrator.core.ports import ScheduledRequest
from tests.engines.perplexity import TEXT, perplexities
from tests.engines.step_driver import StepDriver, random_requests
from tests.engines.tiny_llama import int8_config, tiny_config, tiny_engine, tiny_tensors
from tests.factories import make_request

CPU = torch.device("cpu")
LIMITS = {"max_num_seqs": 32, "max_num_batched_tokens": 256, "max_model_len": 256}


def make_pool(config: LlamaConfig, dtype: torch.dtype, block_size_tokens: int = 4) -> KVPool:
    return KVPool(config.kv_layout(block_size_tokens), 128, dtype=dtype, device=CPU)


def make_weights(config: LlamaConfig) -> DecoderWeights:
    return fuse_weights(config, tiny_tensors(config), dtype=torch.float32, device=CPU)


def cpu_decoder(
    config: LlamaConfig,
    *,
    kv_dtype: torch.dtype = torch.bfloat16,
    block_size_tokens: int = 4,
) -> CpuDecoder:
    pool = make_pool(config, kv_dtype, block_size_tokens)
    return CpuDecoder(config, make_weights(config), pool, **LIMITS)


def rounded(weights: DecoderWeights) -> DecoderWeights:
    """The weights as the CPU decoder computes with them."""
    layers = [
        replace(
            layer,
            qkv=quantize(layer.qkv).dequantized(),
            attention_output=quantize(layer.attention_output).dequantized(),
            gate_up=quantize(layer.gate_up).dequantized(),
            down=quantize(layer.down).dequantized(),
        )
        for layer in weights.layers
    ]
    return replace(weights, layers=tuple(layers), lm_head=quantize(weights.lm_head).dequantized())


def part(prompt: Sequence[int], start: int, count: int, first_block: int) -> ScheduledRequest:
    """A piece of a prompt; the request's blocks lie in descending order."""
    request = make_request(f"{first_block}", prompt_token_ids=prompt)
    return ScheduledRequest(request, start, count, range(first_block, first_block - 20, -1))


def logits_of(decoder: Decoder, *parts: ScheduledRequest) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        step = decoder.compute(parts)
    rows = zip(step.sequences, step.logits.clone(), strict=True)
    return {sequence.request_id: row for sequence, row in rows}


PROMPTS = [list(request.spec.prompt_token_ids) for request in random_requests(1, 5, 17, 60)]


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 2}, {"head_dim": 64}])
@pytest.mark.parametrize("block_size_tokens", [4, 16, 32])
def test_logits_are_those_of_the_readable_decoder_on_the_rounded_weights(
    changes: dict[str, Any], block_size_tokens: int
) -> None:
    """Groups of one and of three query heads, heads of one and of four vectors. What is left is
    the rounding of the matrices' inputs to 8 bits, a tenth of the logits' spread in a model whose
    random weights are this wide."""
    config = int8_config(**changes)
    plain = PlainDecoder(
        LlamaDecoder(config, rounded(make_weights(config)), max_model_len=256),
        make_pool(config, torch.float32, block_size_tokens),
    )
    ours = cpu_decoder(config, kv_dtype=torch.float32, block_size_tokens=block_size_tokens)

    for start, count in ((0, 1), (1, 4), (5, 12), (17, 1), (18, 42)):
        parts = [
            part(prompt[: start + count], start, count, 20 * index + 20)
            for index, prompt in enumerate(PROMPTS)
            if len(prompt) >= start + count
        ]
        expected, found = logits_of(plain, *parts), logits_of(ours, *parts)

        assert found.keys() == expected.keys()
        for name, row in expected.items():
            assert (found[name] - row).std() < 0.15 * row.std()


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_same_bits_in_any_company_and_however_a_prompt_is_cut(
    kv_dtype: torch.dtype,
) -> None:
    config = int8_config()
    prompt = PROMPTS[3]
    alone = logits_of(cpu_decoder(config, kv_dtype=kv_dtype), part(prompt, 0, 60, 40))["40"]

    for cuts in ((0, 60), (0, 1, 2, 60), (0, 7, 33, 59, 60), tuple(range(61))):
        decoder = cpu_decoder(config, kv_dtype=kv_dtype)
        for start, end in itertools.pairwise(cuts):
            company = [part(PROMPTS[2], 0, 17, 80), part(PROMPTS[1], 0, 5, 100)]
            found = logits_of(decoder, *company, part(prompt[:end], start, end - start, 40))

        assert torch.equal(found["40"], alone)


@pytest.mark.usefixtures("cpu_kernels")
def test_the_layers_are_announced_in_order_before_each_touches_the_pool() -> None:
    decoder = cpu_decoder(int8_config())
    expected = logits_of(decoder, part(PROMPTS[2], 0, 17, 40))["40"]
    announced: list[int] = []

    with torch.inference_mode():
        step = decoder.compute([part(PROMPTS[2], 0, 17, 40)], before_layer=announced.append)

    assert announced == [0, 1]
    assert torch.equal(step.logits[0], expected)


@pytest.mark.usefixtures("cpu_kernels")
def test_a_model_in_other_sizes_is_refused_with_the_size() -> None:
    with pytest.raises(EngineError, match=r"int8.*hidden_size is 48, not a multiple of 32; use fl"):
        tiny_engine(tiny_config(), dtype="int8")


@pytest.mark.usefixtures("cpu_kernels")
def test_auto_is_int8_where_it_can_be_computed_and_float32_elsewhere() -> None:
    assert resolve_dtype("auto", device="cpu", config=int8_config()) == "int8"
    assert resolve_dtype("auto", device="cpu", config=tiny_config()) == "float32"
    assert resolve_dtype("auto", device="cuda", config=int8_config()) == "bfloat16"
    assert resolve_dtype("bfloat16", device="cpu", config=int8_config()) == "bfloat16"


def test_without_a_compiler_the_obstacle_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    if (cpu_library.obstacle() or "").startswith("its processor"):
        pytest.skip("needs a processor that could run the kernels")
    monkeypatch.setenv("CXX", "no-such-compiler")

    assert cpu_library.obstacle() == "it has no C++ compiler; install g++"
    assert resolve_dtype("auto", device="cpu", config=int8_config()) == "float32"


@pytest.mark.slow
@pytest.mark.usefixtures("best_cpu_kernels")
def test_no_format_loses_a_hundredth_of_the_perplexity(smollm2_dir: Path) -> None:
    """On a text of stories, explanations and code."""
    found = perplexities(smollm2_dir)

    assert 3 < found["float32"] < 40
    assert found["bfloat16"] < 1.01 * found["float32"]
    assert found["int8"] < 1.01 * found["float32"]


@pytest.mark.slow
@pytest.mark.usefixtures("best_cpu_kernels")
def test_the_real_model_says_the_same_after_preemption_and_in_company(smollm2_dir: Path) -> None:
    """Bits, not only tokens, are the same; so text is, wherever a request is continued."""
    options = TorchEngineOptions(
        device="cpu",
        dtype="int8",
        num_device_blocks=300,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        max_model_len=1024,
    )
    engine = TorchEngine.load(smollm2_dir, options)
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    prompts = [tokenizer.encode(line).ids for line in TEXT.read_text().splitlines() if line][:6]

    def requests() -> list[Any]:
        return [
            make_request(str(index), prompt_token_ids=prompt, max_tokens=24)
            for index, prompt in enumerate(prompts)
        ]

    alone: dict[str, list[int]] = {}
    for request in requests():
        alone |= StepDriver(engine, request).run(chunk_tokens=512)
    driver = StepDriver(engine, *requests())
    for name in alone:
        driver.step(dict.fromkeys(driver.unfinished(), 20))
        driver.preempt(name)

    assert driver.run(chunk_tokens=20) == alone
    engine.close()


@pytest.mark.usefixtures("best_cpu_kernels")
def test_kernels_that_cannot_be_compiled_or_kept_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that fails, and then a cache folder that is a file."""
    compiler = tmp_path / "broken-compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no luck >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_library.load_library.cache_clear()
    with pytest.raises(EngineError, match="cannot compile the CPU kernels: no luck"):
        cpu_library.load_library()

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"cannot be kept in .*; set XDG_CACHE_HOME"):
        cpu_library.load_library()
