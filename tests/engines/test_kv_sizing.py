from __future__ import annotations

import pytest

from engines.kv_sizing import check_blocks_fit, free_host_bytes, num_blocks_in_free_memory
from orchestrator.core.errors import EngineError


def test_a_share_of_the_free_memory_becomes_whole_blocks() -> None:
    """90 % of 10,000 bytes are 9 blocks of 950."""
    assert num_blocks_in_free_memory(10_000, 0.9, 950) == 9


def test_memory_for_less_than_one_block_is_refused_with_the_numbers() -> None:
    with pytest.raises(EngineError, match=r"90% of the 1,000 bytes .* no KV block of 950"):
        num_blocks_in_free_memory(1000, 0.9, 950)


def test_blocks_that_just_fit_are_taken() -> None:
    check_blocks_fit(10, 100, free_bytes=1000, memory="device", keys="device_kv_bytes")


def test_blocks_beyond_the_free_memory_are_refused_with_the_numbers() -> None:
    message = (
        "11 KV blocks of 100 bytes take 1,100 of device memory, 1,000 are free .*"
        "lower device_kv_bytes"
    )
    with pytest.raises(EngineError, match=message):
        check_blocks_fit(11, 100, free_bytes=1000, memory="device", keys="device_kv_bytes")


def test_a_system_that_does_not_tell_its_free_memory_is_trusted() -> None:
    check_blocks_fit(10**9, 10**9, free_bytes=None, memory="main", keys="host_kv_bytes")


def test_this_machine_has_memory() -> None:
    free_bytes = free_host_bytes()

    assert free_bytes is None or free_bytes > 1024**2
