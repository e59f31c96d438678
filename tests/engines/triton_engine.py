"""The decoder of Triton kernels as a whole engine, on whatever device tests have for kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engines.kv_copies import KVCopies
from engines.kv_pool import KVPool
from engines.step_runner import StepLogits, StepRunner
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.weights import fuse_weights
from orchestrator.core.ports import (
    EngineCapabilities,
    ScheduledRequest,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.sampling import Sampler
from tests.engines.tiny_llama import tiny_tensors
from tests.engines.triton_device import DEVICE


class TritonEngine:
    """Steps of a tiny model in float32."""

    def __init__(self, config: LlamaConfig, *, block_size_tokens: int = 4, **limits: Any) -> None:
        # Imported here, behind the choice of the device.
        from engines.torch_engine.triton_decoder import TritonDecoder

        self.capabilities = EngineCapabilities(
            **{
                "block_size_tokens": block_size_tokens,
                "num_device_blocks": 128,
                "num_host_blocks": 0,
                "num_layer_groups": config.num_hidden_layers,
                "max_num_batched_tokens": 256,
                "max_num_seqs": 6,
                "max_model_len": 256,
            }
            | limits
        )
        capabilities = self.capabilities
        self._pool = KVPool(
            config.kv_layout(block_size_tokens),
            capabilities.num_device_blocks,
            num_host_blocks=capabilities.num_host_blocks,
            dtype=torch.float32,
            device=DEVICE,
        )
        self._decoder = TritonDecoder(
            config,
            fuse_weights(config, tiny_tensors(config), dtype=torch.float32, device=DEVICE),
            self._pool,
            max_num_seqs=capabilities.max_num_seqs,
            max_num_batched_tokens=capabilities.max_num_batched_tokens,
            max_model_len=capabilities.max_model_len,
        )
        self._copies = KVCopies(self._pool, num_layer_groups=capabilities.num_layer_groups)
        self._runner = StepRunner(
            capabilities,
            self._copies,
            Sampler(config.vocab_size),
            compute=self._compute,
            compute_ahead=self._decoder.compute_ahead,
        )

    def step(self, plan: SchedulerOutput) -> StepOutput:
        return self._runner.run(plan)

    def launch_ahead(self, plan: SchedulerOutput) -> bool:
        return self._runner.launch_ahead(plan)

    def close(self) -> None:
        self._runner.close()
        self._copies.close()
        self._decoder.close()
        self._pool.close()

    def _compute(self, parts: Sequence[ScheduledRequest]) -> StepLogits:
        before_layer = self._copies.before_layer if self._copies.waits_by_layer else None
        return self._decoder.compute(parts, before_layer=before_layer)
