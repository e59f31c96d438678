"""The embedded engine under a real scheduler; see `scheduled_node`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from engines.torch_engine import TorchEngine
from tests.engines.scheduled_node import MAX_TOKENS, check_live
from tests.engines.step_driver import StepDriver
from tests.engines.tiny_llama import tiny_config, tiny_engine, tiny_tensors
from tests.factories import make_request


@cache
def tensors() -> dict[str, torch.Tensor]:
    return tiny_tensors(tiny_config())


@cache
def undisturbed_engine() -> TorchEngine:
    return tiny_engine(tensors=tensors())


@cache
def undisturbed(prompt: tuple[int, ...]) -> list[int]:
    """Return the tokens of a request that runs alone."""
    request = make_request("alone", prompt_token_ids=prompt, max_tokens=MAX_TOKENS)
    return StepDriver(undisturbed_engine(), request).run(chunk_tokens=256)["alone"]


@pytest.mark.parametrize(
    ("num_layer_groups", "failure_rate"), [(1, 0.0), (2, 0.0), (1, 0.15), (2, 0.15)]
)
def test_no_token_changes(num_layer_groups: int, failure_rate: float) -> None:
    def make_engine(**options: Any) -> TorchEngine:
        return tiny_engine(tensors=tensors(), num_layer_groups=num_layer_groups, **options)

    check_live(make_engine, undisturbed, failure_rate=failure_rate, num_examples=20)
