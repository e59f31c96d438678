"""The tensors that one rank's engine reads and writes, in memory that is taken once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.engine_options import EngineOptions
from engines.kv_pool import KVPool
from engines.trtllm.engine_config import TrtLlmEngineConfig
from engines.trtllm.engine_tensors import NUM_PERF_KNOBS
from engines.trtllm.packing import StepArrays

_HOST_COPIES = {
    "context_lengths": "host_context_lengths",
    "kv_cache_block_offsets": "host_kv_cache_block_offsets",
}
"""Inputs that the engine reads on the device and, under the other name, on the host."""

# Indices of `host_runtime_perf_knobs`. Both are on: decodes of long contexts are split over more
# of the GPU, and attention of float16 prompts is summed up in float32.
_MULTI_BLOCK_MODE, _CONTEXT_FMHA_FP32_ACCUMULATION = 0, 1


@dataclass(frozen=True, slots=True)
class _Staged:
    """An input in the size of the largest step."""

    host: torch.Tensor  # pinned if the device is CUDA
    device: torch.Tensor | None
    """Filled from `host`; None if the engine reads it there."""


class StepTensors:
    """All inputs of a step, and its logits. Addresses stay; shapes change with the step."""

    def __init__(
        self,
        config: TrtLlmEngineConfig,
        options: EngineOptions,
        *,
        device: torch.device,
        logits_dtype: torch.dtype,
        all_reduce_workspace: torch.Tensor | None,
    ) -> None:
        """Take the memory of the largest step that the options allow.

        `all_reduce_workspace` is there if and only if the engine has several ranks.
        """
        num_seqs, vocab_size = options.max_num_seqs, config.vocab_size_padded
        tokens, sequences = (options.max_num_batched_tokens,), (num_seqs,)

        def staged(shape: tuple[int, ...], *, is_on_host: bool = False) -> _Staged:
            host = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
            return _Staged(host, None if is_on_host else torch.zeros_like(host, device=device))

        self._staged = {
            "input_ids": staged(tokens),
            "position_ids": staged(tokens),
            "last_token_ids": staged(sequences),
            "context_lengths": staged(sequences),
            "sequence_length": staged(sequences),
            "host_past_key_value_lengths": staged(sequences, is_on_host=True),
            "host_request_types": staged(sequences, is_on_host=True),
            "kv_cache_block_offsets": staged((1, num_seqs, 2, config.max_blocks_per_seq)),
        }
        self._constants = _constants(config)
        if all_reduce_workspace is not None:
            self._constants["all_reduce_workspace"] = all_reduce_workspace
        # Which beam each token of the cache belongs to: there is but one.
        self._cache_indirection = torch.zeros(
            num_seqs, 1, config.max_seq_len, dtype=torch.int32, device=device
        )
        self._logits = torch.zeros(num_seqs, vocab_size, dtype=logits_dtype, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def attach(self, pool: KVPool) -> None:
        """Let the engine read and write the K and V of this pool."""
        # The second address is that of a pool in host memory. There is none: whatever a request
        # that runs needs has been brought to the device.
        self._constants["host_kv_cache_pool_pointers"] = torch.tensor(
            [[pool.blocks.data_ptr(), 0]], dtype=torch.int64
        )

    def load(self, arrays: StepArrays) -> dict[str, torch.Tensor]:
        """Return the inputs of a step by name; they hold until the next call.

        Copies to the device are queued on the current stream.
        """
        if self._copied is not None:
            # Of the step before: if that failed, its copies may still be reading.
            self._copied.synchronize()
        inputs = dict(self._constants)
        for name, array in arrays.by_name().items():
            staged, used = self._staged[name], tuple(slice(size) for size in array.shape)
            host = staged.host[used].copy_(torch.from_numpy(array))
            if staged.device is None:
                inputs[name] = host
                continue
            inputs[name] = staged.device[used].copy_(host, non_blocking=True)
            if name in _HOST_COPIES:
                inputs[_HOST_COPIES[name]] = host
        if self._copied is not None:
            self._copied.record()
        inputs["cache_indirection"] = self._cache_indirection[: len(arrays.last_token_ids)]
        return inputs

    def logits(self, num_sequences: int) -> torch.Tensor:
        """Return where the engine writes the logits of so many sequences, the padding of the
        vocabulary included."""
        return self._logits[:num_sequences]


def _constants(config: TrtLlmEngineConfig) -> dict[str, torch.Tensor]:
    """Return the inputs that are the same in every step; the engine reads all of them on the
    host."""
    num_layers = config.num_layers
    perf_knobs = torch.full((NUM_PERF_KNOBS,), -1, dtype=torch.int64)
    perf_knobs[_MULTI_BLOCK_MODE] = 1
    perf_knobs[_CONTEXT_FMHA_FP32_ACCUMULATION] = 1
    return {
        # Pool 0 holds all layers, in their order.
        "host_kv_cache_pool_mapping": torch.tensor(
            [[0, layer] for layer in range(num_layers)], dtype=torch.int32
        ),
        # A smaller window would make the cache a ring.
        "host_max_attention_window_sizes": torch.full(
            (num_layers,), config.max_seq_len, dtype=torch.int32
        ),
        "host_sink_token_length": torch.zeros(1, dtype=torch.int32),
        "host_runtime_perf_knobs": perf_knobs,
        "host_context_progress": torch.zeros(1, dtype=torch.int64),  # a null pointer
    }
