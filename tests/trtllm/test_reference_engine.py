"""Engine directories of the stand-ins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from engines.manifest import read_manifest
from engines.trtllm.engine_config import read_engine_config
from tests.engines.step_driver import StepDriver
from tests.engines.tiny_llama import (
    tiny_config,
    tiny_engine,
    tiny_tensors,
    write_tiny_engine_dir,
)
from tests.factories import make_request
from tests.tiny_tokenizer import write_tiny_tokenizer
from tests.trtllm.engine_spec import EngineSpec, engine_bytes, parse_engine
from tests.trtllm.reference_engine import (
    fake_spec,
    llama_spec,
    write_fake_engine,
    write_llama_engine,
)
from tests.trtllm.session_driver import SessionDriver


@pytest.fixture
def tiny_dir(tmp_path: Path) -> Path:
    """A directory of the embedded engine."""
    write_tiny_engine_dir(tmp_path / "tiny")
    return write_tiny_tokenizer(tmp_path / "tiny")


def test_an_engine_file_holds_what_it_was_made_of() -> None:
    config = tiny_config()
    spec, tensors = llama_spec(config, tokens_per_block=4), tiny_tensors(config)

    found, weights = parse_engine(engine_bytes(spec, tensors))

    assert found == spec
    assert weights.keys() == tensors.keys()
    assert all(weights[name].equal(tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "spec",
    [
        fake_spec(),
        fake_spec(tp_size=2),
        fake_spec(dtype="bfloat16", tokens_per_block=32, max_seq_len=1000),
        replace(fake_spec(), kv_cache_dtype="fp8", logits_dtype="float16"),
        replace(fake_spec(), kv_cache_dtype="int8"),
    ],
)
def test_a_fakes_directory_passes_the_check_and_says_its_sizes(
    spec: EngineSpec, tmp_path: Path
) -> None:
    directory = write_fake_engine(tmp_path / "engine", spec)

    config = read_engine_config(directory)
    assert (config.num_layers, config.num_kv_heads_per_rank(), config.head_size) == (
        spec.num_layers,
        spec.num_kv_heads_per_rank,
        spec.head_size,
    )
    assert (config.max_batch_size, config.max_num_tokens, config.max_seq_len) == (
        spec.max_batch_size,
        spec.max_num_tokens,
        spec.max_seq_len,
    )
    assert (config.dtype, config.kv_cache_dtype) == (spec.dtype, spec.kv_cache_dtype)
    assert config.logits_dtype == spec.logits_dtype
    assert config.tp_size == spec.tp_size
    assert config.tokens_per_block == spec.tokens_per_block
    assert config.vocab_size_padded == spec.vocab_size_padded
    manifest = read_manifest(directory)
    assert manifest.block_size_tokens == spec.tokens_per_block
    assert manifest.files.keys() == {path.name for path in directory.iterdir()} - {"manifest.json"}


def test_each_rank_has_its_own_engine(tmp_path: Path) -> None:
    directory = write_fake_engine(tmp_path / "engine", fake_spec(tp_size=2))

    ranks = [parse_engine((directory / f"rank{rank}.engine").read_bytes())[0] for rank in (0, 1)]

    assert [spec.rank for spec in ranks] == [0, 1]


def test_a_fakes_vocabulary_holds_its_tokenizers(tmp_path: Path) -> None:
    spec = fake_spec()

    directory = write_fake_engine(tmp_path / "engine", spec)

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() <= spec.vocab_size


@pytest.mark.usefixtures("stand_ins")
def test_a_llamas_directory_runs_as_the_one_it_was_made_from(
    tiny_dir: Path, tmp_path: Path
) -> None:
    directory = write_llama_engine(tmp_path / "engine", tiny_dir, tokens_per_block=8)
    content = (directory / "rank0.engine").read_bytes()
    prompt = list(range(20))

    driver = SessionDriver(content, parse_engine(content)[0], {"r": prompt})

    request = make_request("r", prompt_token_ids=prompt, max_tokens=6)
    expected = StepDriver(tiny_engine(), request).run(chunk_tokens=100)
    assert driver.run(6, chunk_tokens=7) == expected


def test_a_llamas_directory_passes_the_check_and_keeps_the_tokenizer(
    tiny_dir: Path, tmp_path: Path
) -> None:
    """Blocks stay those of the source; the source's profiles and texts are taken over."""
    directory = write_llama_engine(tmp_path / "engine", tiny_dir, max_batch_size=3)

    config = read_engine_config(directory)
    assert (config.num_attention_heads, config.num_kv_heads, config.hidden_size) == (6, 2, 48)
    assert (config.tokens_per_block, config.max_batch_size, config.max_seq_len) == (4, 3, 128)
    source, manifest = read_manifest(tiny_dir), read_manifest(directory)
    assert manifest.latency_profile == source.latency_profile
    assert manifest.eos_token_ids == source.eos_token_ids
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (directory / name).read_bytes() == (tiny_dir / name).read_bytes()
