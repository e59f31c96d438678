from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from build_scripts.profile_engine import MeasuredProfile, main, profile_engine
from build_scripts.recipe import ProfileSettings
from engines.manifest import read_manifest
from orchestrator.core.errors import EngineError
from orchestrator.core.ports import Engine, SchedulerOutput, StepOutput
from tests.build_scripts.clockwork_engine import PROFILE, ClockworkEngine
from tests.engines.tiny_llama import tiny_config, tiny_engine, write_tiny_engine_dir
from tests.factories import make_capabilities

SETTINGS = ProfileSettings(
    prefill_new_tokens=(8, 32, 64),
    prefill_cached_tokens=(0, 64),
    decode_batch_sizes=(1, 4, 8),
    decode_cached_tokens=(4, 32, 100),
    num_mixed_steps=8,
    num_repeats=2,
)

# Wide enough that a prompt's tokens cost more than the noise of a shared machine.
WIDE = tiny_config(
    hidden_size=256,
    intermediate_size=1024,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
)


def measure(
    engine: Engine,
    settings: ProfileSettings = SETTINGS,
    *,
    on_progress: Callable[[float], None] = lambda _: None,
) -> MeasuredProfile:
    return profile_engine(
        engine, settings, device="cpu", dtype="float32", vocab_size=97, on_progress=on_progress
    )


def test_the_profile_of_an_engine_that_follows_the_model_is_exact() -> None:
    measured = measure(ClockworkEngine())

    for name, value in PROFILE.to_dict().items():
        assert getattr(measured.profile, name) == pytest.approx(value, rel=1e-6), name
    assert measured.conditions.held_out_percentage_error == pytest.approx(0, abs=1e-6)


def test_measured_decodes_are_decodes() -> None:
    """One new token each, the last one known, after output that is already there."""
    engine = ClockworkEngine()
    measure(engine)

    parts = [part for plan in engine.plans for part in plan.scheduled]
    decodes = [part for part in parts if part.request.is_decoding]
    assert all(part.num_new_tokens == 1 and part.is_sampled for part in decodes)
    assert {part.num_computed_tokens for part in decodes} >= set(SETTINGS.decode_cached_tokens)


def test_requests_of_a_step_never_share_blocks() -> None:
    engine = ClockworkEngine()
    measure(engine)

    for plan in engine.plans:
        block_ids = [block for part in plan.scheduled for block in part.block_ids]
        assert len(block_ids) == len(set(block_ids))


def test_steps_beyond_the_engine_limits_are_left_out() -> None:
    limits = make_capabilities(max_num_seqs=4, max_model_len=90, num_device_blocks=12)
    engine = ClockworkEngine(limits)
    measure(engine)

    assert max(len(plan.scheduled) for plan in engine.plans) == 4
    parts = [part for plan in engine.plans for part in plan.scheduled]
    assert max(part.num_computed_tokens + part.num_new_tokens for part in parts) <= 90


def test_every_step_is_measured_once_even_without_time() -> None:
    engine = ClockworkEngine()
    hurried = SETTINGS.model_copy(update={"max_s": 1e-9})
    measure(engine, hurried)

    num_steps = 3 * 2 + 3 * 3 + 8
    assert len(engine.plans) == 2 + num_steps + 1  # two warm-ups first, one empty plan last


def test_progress_ends_complete_and_never_goes_back() -> None:
    seen: list[float] = []
    measure(ClockworkEngine(), on_progress=seen.append)

    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_a_fit_that_is_far_off_is_refused() -> None:
    """Decodes at 100 tokens take a hundred times longer than the line through the others."""

    class Erratic(ClockworkEngine):
        def step(self, plan: SchedulerOutput) -> StepOutput:
            output = super().step(plan)
            return replace(output, step_s=output.step_s * (100 if plan.step_id % 2 else 1))

    with pytest.raises(EngineError, match=r"off by \d+% on average, the limit is 20%"):
        measure(Erratic(), SETTINGS.model_copy(update={"max_mean_error": 0.2, "num_repeats": 1}))


def test_the_real_engine_can_be_profiled() -> None:
    engine = tiny_engine(WIDE, max_num_seqs=9, num_device_blocks=300)

    measured = measure(engine)

    assert measured.profile.prefill_token_s + measured.profile.prefill_quadratic_s > 0
    assert measured.conditions.num_samples == 3 * 2 + 3 * 3 + 4


def test_the_command_replaces_the_profiles_in_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write_tiny_engine_dir(tmp_path / "tiny", WIDE)

    status = main([str(tmp_path / "tiny"), "--dtype", "bfloat16", "--max-s", "1"])

    after = read_manifest(tmp_path / "tiny")
    assert status == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines[-2:]] == ["Latency profile", "Copy profile"]
    assert after.profile_conditions.dtype == "bfloat16"
    assert after.latency_profile != before.latency_profile
    assert after.copy_profile != before.copy_profile
    assert (
        replace(
            after,
            latency_profile=before.latency_profile,
            copy_profile=before.copy_profile,
            profile_conditions=before.profile_conditions,
        )
        == before
    )


def test_the_command_reports_a_damaged_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_engine_dir(tmp_path / "tiny")
    (tmp_path / "tiny" / "manifest.json").write_text(json.dumps({}))

    assert main([str(tmp_path / "tiny")]) == 1
    assert "format version" in capsys.readouterr().err
