"""Copies of the embedded engine's KV blocks, which come in groups of layers.

`test_engine_contract_copies.py` has what every engine promises.
"""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.core.errors import EngineError
from tests.engines.copies import slow_copies
from tests.engines.step_driver import reload_together, tokens_alone
from tests.engines.tiny_llama import tiny_config, tiny_engine

CONFIG = tiny_config(num_hidden_layers=5)


@pytest.mark.parametrize("waits_for_transfers", [False, True])
@pytest.mark.parametrize("num_layer_groups", [1, 2, 4, 9])
def test_onboarded_blocks_can_be_read_by_the_step_that_brings_them(
    num_layer_groups: int, *, waits_for_transfers: bool
) -> None:
    """Their copies are late. Without the wait in `KVCopies.before_layer`, or in `hold_compute`,
    this fails."""
    engine = tiny_engine(
        CONFIG, num_device_blocks=70, num_host_blocks=40, copy_blocks=slow_copies,
        num_layer_groups=num_layer_groups,
    )  # fmt: skip

    output, tokens = reload_together(engine, waits_for_transfers=waits_for_transfers)

    assert output.new_token_ids.keys() == {"17", "24", "35"}
    assert tokens == tokens_alone(tiny_engine(CONFIG), 17, 24, 35, 150)
    engine.close()


def test_layer_groups_are_at_most_the_layers() -> None:
    assert tiny_engine(num_layer_groups=9).capabilities.num_layer_groups == 2
    assert tiny_engine(CONFIG, num_layer_groups=4).capabilities.num_layer_groups == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_host_blocks": -1}, "num_host_blocks is -1, it must be at least 0"),
        ({"num_layer_groups": 0}, "num_layer_groups is 0, it must be at least 1"),
        ({"device_memory_fraction": 0.0}, "device_memory_fraction is 0.0, it must be above 0"),
        ({"device_memory_fraction": 1.5}, "device_memory_fraction is 1.5, .* at most 1"),
        ({"num_device_blocks": None}, "num_device_blocks is not set; on the CPU it must be"),
        (
            {"num_host_blocks": 10**12},
            r"take [\d,]+ of main memory, [\d,]+ are free .*lower device_kv",
        ),
        (
            {"num_device_blocks": 10**12},
            r"take [\d,]+ of main memory, [\d,]+ are free .*lower device_kv",
        ),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        tiny_engine(**changes)
