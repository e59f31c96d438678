"""Limits and memory of an engine on this machine, whatever computes its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.core.errors import EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run an engine directory on this machine."""

    device: Literal["cpu", "cuda"]
    num_device_blocks: int | None
    """KV blocks on the device; None takes as many as `device_memory_fraction` has room for,
    which only CUDA can."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    """At most the engine directory's."""

    num_host_blocks: int = 0
    """KV blocks in main memory, for what is offloaded."""

    device_memory_fraction: float = 0.9
    """Share of the device memory that is free after loading the model, above 0 and at most 1.
    The rest is for what a step computes. Read only if `num_device_blocks` is None."""

    def __post_init__(self) -> None:
        lowest = dict.fromkeys(("max_num_batched_tokens", "max_num_seqs", "max_model_len"), 1)
        lowest["num_host_blocks"] = 0
        if self.num_device_blocks is not None:
            lowest["num_device_blocks"] = 1
        elif self.device == "cpu":
            raise EngineError("num_device_blocks is not set; on the CPU it must be")
        for name, limit in lowest.items():
            if getattr(self, name) < limit:
                raise EngineError(f"{name} is {getattr(self, name)}, it must be at least {limit}")
        if not 0 < self.device_memory_fraction <= 1:
            raise EngineError(
                f"device_memory_fraction is {self.device_memory_fraction}, "
                "it must be above 0 and at most 1"
            )
