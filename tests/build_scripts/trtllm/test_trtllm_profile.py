"""Measuring built engines: one that keeps to a clock, and one that the stand-in packages run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from build_scripts.trtllm.profile_file import EngineProfile
from build_scripts.trtllm.profile_step import engine_options, main, measure
from build_scripts.trtllm.recipe import EngineProfileSettings
from engines.engine_options import EngineOptions
from engines.manifest import read_manifest
from engines.trtllm.engine import TrtLlmEngine
from engines.trtllm.engine_config import TrtLlmEngineConfig, read_engine_config
from tests.build_scripts.clockwork_engine import PROFILE, ClockworkEngine
from tests.build_scripts.trtllm.fake_machine import ROOT, make_machine, write_model
from tests.engines.step_driver import StepDriver
from tests.engines.tiny_llama import tiny_config, tiny_tensors
from tests.factories import make_request
from tests.trtllm.engine_config_json import engine_config_json, write_engine_dir
from tests.trtllm.stand_in_path import stand_ins_importable

SETTINGS = EngineProfileSettings(
    device="cpu",
    num_device_blocks=64,
    prefill_new_tokens=(8, 32, 64),
    prefill_cached_tokens=(0, 64),
    decode_batch_sizes=(1, 4, 8),
    decode_cached_tokens=(4, 32, 100),
    num_repeats=1,
)

# Wide and long enough that a prompt's tokens cost more than the noise of a shared machine.
LONG_STEPS = EngineProfileSettings(
    device="cpu",
    num_device_blocks=64,
    prefill_new_tokens=(32, 128, 256, 512),
    prefill_cached_tokens=(0,),
    decode_batch_sizes=(1, 8, 16),
    decode_cached_tokens=(16, 40),
    num_mixed_steps=4,
    num_repeats=3,
    max_s=3.0,
    max_mean_error=1000.0,
)
WIDE = tiny_config(
    max_position_embeddings=512,
    vocab_size=420,
    hidden_size=256,
    intermediate_size=1024,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
)


def small_config(tmp_path: Path) -> TrtLlmEngineConfig:
    model = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_size": 16}
    write_engine_dir(tmp_path, engine_config_json(model=model))
    return read_engine_config(tmp_path)


def test_the_profile_of_an_engine_that_follows_the_model_is_exact(tmp_path: Path) -> None:
    profile, lines = measure(ClockworkEngine(), small_config(tmp_path), SETTINGS)

    for name, value in PROFILE.to_dict().items():
        assert getattr(profile.latency, name) == pytest.approx(value, rel=1e-6), name
    assert (profile.conditions.device, profile.conditions.dtype) == ("cpu", "bfloat16")
    assert profile.copies.onboard_block_s > 0
    # 2 layers, K and V, 2 heads, 32 tokens, 16 numbers of 2 bytes
    assert lines[1].endswith("blocks of 8,192 bytes")


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile, _ = measure(ClockworkEngine(), small_config(tmp_path), SETTINGS)

    profile.write(tmp_path / "profile")

    assert EngineProfile.read(tmp_path / "profile") == profile


def test_an_engine_is_measured_up_to_the_limits_it_was_built_with(tmp_path: Path) -> None:
    options = engine_options(small_config(tmp_path), SETTINGS)

    assert options == EngineOptions(
        device="cpu",
        num_device_blocks=64,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
        max_model_len=8192,
    )


@pytest.mark.slow
def test_a_real_build_ends_with_an_engine_that_runs(tmp_path: Path) -> None:
    """Converted, compiled and measured in processes of their own, as on a machine with a GPU; if
    others keep this machine busy, measured again, as the build asks for."""
    machine = make_machine(tmp_path)
    write_model(tmp_path / "model", **WIDE.to_dict())
    weights = {name: t.to(torch.bfloat16) for name, t in tiny_tensors(WIDE).items()}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    machine.behave(build={"llama": True})
    machine.write_recipe(
        limits={"max_batch_size": 16, "max_num_tokens": 512, "max_seq_len": 512},
        profile=LONG_STEPS.model_dump(mode="json"),
    )

    build = [sys.executable, "-m", "build_scripts.build_engine", str(machine.recipe)]
    while True:
        built = subprocess.run(
            build, env=machine.environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if "is something else using the machine? profile again" not in built.stderr:
            break
    assert built.returncode == 0, built.stderr

    manifest = read_manifest(machine.engine_dir)
    assert manifest.latency_profile.prefill_token_s + manifest.latency_profile.prefill_quadratic_s
    assert manifest.profile_conditions.dtype == "bfloat16"
    (log,) = (machine.work_dir / "logs").glob("profile-*.log")
    assert "Latency profile: " in log.read_text()
    config = read_engine_config(machine.engine_dir)
    with stand_ins_importable():
        engine = TrtLlmEngine(machine.engine_dir, engine_options(config, SETTINGS))
        outputs = StepDriver(engine, make_request(prompt_token_ids=[3, 4])).run(chunk_tokens=8)
        engine.close()
    assert len(outputs["r"]) == 8


def test_an_engine_that_cannot_be_loaded_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without TensorRT-LLM on the path, as a broken installation would be."""
    write_engine_dir(tmp_path / "engine", engine_config_json())
    settings = SETTINGS.model_dump_json()

    status = main([str(tmp_path / "engine"), str(tmp_path / "profile"), "--settings", settings])

    assert status == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("error: TensorRT-LLM cannot be imported")
    assert not (tmp_path / "profile").exists()
