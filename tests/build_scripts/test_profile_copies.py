from __future__ import annotations

import itertools

import pytest
import torch

from build_scripts.profile_copies import (
    CopyCase,
    describe_copies,
    fit_copy_profile,
    measure_copy_profile,
)
from engines.kv_pool import KVLayout
from orchestrator.core.errors import EngineError
from orchestrator.core.kv_transfer import CopyProfile, TransferDirection

PROFILE = CopyProfile(
    onboard_block_s=1e-4,
    offload_block_s=2e-4,
    contended_onboard_block_s=3e-4,
    contended_offload_block_s=5e-4,
    start_s=7e-5,
)

# 192 KiB a block in float32.
LAYOUT = KVLayout(num_layers=6, num_kv_heads=4, block_size_tokens=16, head_dim=64)


def durations_of(profile: CopyProfile) -> dict[CopyCase, float]:
    block_s = {
        (TransferDirection.ONBOARD, False): profile.onboard_block_s,
        (TransferDirection.OFFLOAD, False): profile.offload_block_s,
        (TransferDirection.ONBOARD, True): profile.contended_onboard_block_s,
        (TransferDirection.OFFLOAD, True): profile.contended_offload_block_s,
    }
    return {
        CopyCase(direction, is_contended, count): profile.start_s + count * seconds
        for ((direction, is_contended), seconds), count in itertools.product(
            block_s.items(), (1, 4, 16, 64)
        )
    }


def test_durations_that_follow_a_profile_give_that_profile() -> None:
    fitted = fit_copy_profile(durations_of(PROFILE))

    assert fitted.to_dict() == pytest.approx(PROFILE.to_dict(), rel=1e-6)


def test_no_constant_is_negative() -> None:
    """Large copies that are faster than the small ones promise would make a negative start."""
    durations = durations_of(PROFILE)
    for case in durations:
        durations[case] = 1e-4 * case.num_blocks**1.3

    fitted = fit_copy_profile(durations)

    assert min(fitted.to_dict().values()) >= 0
    assert fitted.start_s == 0


def test_copies_that_take_the_same_time_whatever_their_size_are_refused() -> None:
    durations = dict.fromkeys(durations_of(PROFILE), 0.001)

    with pytest.raises(EngineError, match=r"16 copies failed: .*onboard_block_s is 0"):
        fit_copy_profile(durations)


def test_real_copies_can_be_measured() -> None:
    profile = measure_copy_profile(LAYOUT, torch.float32, "cpu", num_layer_groups=4, max_s=3.0)

    assert profile.onboard_block_s > 0
    assert profile.offload_block_s > 0


def test_the_line_for_a_person_tells_rates() -> None:
    """196,608 bytes in 100 microseconds are 2 GB a second."""
    line = describe_copies(PROFILE, LAYOUT, torch.float32)

    assert "onboard 2.0 GB/s (0.7 GB/s beside an offload)" in line
    assert "offload 1.0 GB/s (0.4 GB/s beside an onboard)" in line
    assert "0.07 ms to start, blocks of 196,608 bytes" in line
