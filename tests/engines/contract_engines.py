"""The engines that the contract suite runs on, all made in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from engines.host_link import HostLink
from engines.kv_copies import CopyBlocks, copy_blocks
from engines.simulated import SimulatedEngine
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import Engine
from tests.engines.tiny_llama import BLOCK_SIZE_TOKENS, tiny_config, tiny_engine
from tests.factories import make_capabilities, make_copy_profile, make_profile

EngineKind = Literal["simulated", "torch"]

BLOCK_BYTES = 2 * 2 * 2 * BLOCK_SIZE_TOKENS * 8 * 4
"""Of the tiny model: 2 layers, K and V, 2 heads, 8 numbers of 4 bytes."""


class EngineMaker:
    """Makes engines of one kind, and closes them when the test is over."""

    def __init__(self, kind: EngineKind) -> None:
        self._kind = kind
        self._open: list[Engine] = []

    def __call__(
        self,
        *,
        copy_blocks: CopyBlocks = copy_blocks,
        tensors: Mapping[str, torch.Tensor] | None = None,
        **limits: int,
    ) -> Engine:
        """Return a new engine of the tiny model, with 128 blocks, 256 tokens and 16 requests a step
        unless `limits` (fields of EngineCapabilities) say otherwise.

        A simulated engine has no copies to disturb and no tensors.
        """
        defaults = {
            "num_device_blocks": 128,
            "max_num_batched_tokens": 256,
            "max_num_seqs": 16,
            "max_model_len": 256,
        }
        engine = self._make(defaults | limits, copy_blocks, tensors)
        self._open.append(engine)
        return engine

    def close(self, engine: Engine) -> None:
        """Close an engine before the test is over."""
        self._open.remove(engine)
        engine.close()

    def close_all(self) -> None:
        """Close what is open."""
        while self._open:
            self._open.pop().close()

    def _make(
        self,
        limits: Mapping[str, int],
        copy_blocks: CopyBlocks,
        tensors: Mapping[str, torch.Tensor] | None,
    ) -> Engine:
        match self._kind:
            case "simulated":
                return SimulatedEngine(
                    make_capabilities(block_size_tokens=BLOCK_SIZE_TOKENS, **limits),
                    BatchLatencyModel(make_profile()),
                    output_lengths={},
                    link=HostLink(make_copy_profile()),
                    block_bytes=BLOCK_BYTES,
                )
            case "torch":
                return tiny_engine(
                    tiny_config(),
                    None if tensors is None else dict(tensors),
                    copy_blocks=copy_blocks,
                    **limits,
                )
