"""The embedded Llama on one engine's tensors: K and V lie where the block tables say.

Layers, norms and rotation are the embedded engine's; batches and the addresses of K and V are made
here, from what the engine was given alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from engines.torch_engine.batch import DecodeGroup, PrefillPiece, StepBatch
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.model import LlamaDecoder
from engines.torch_engine.weights import fuse_weights
from tests.trtllm.engine_spec import TORCH_DTYPES, EngineSpec
from tests.trtllm.memory import KVMemory
from tests.trtllm.step_checks import EngineStep, Ints

_CPU = torch.device("cpu")


class LlamaModel:
    """Computes the steps of one engine; holds no request state."""

    def __init__(self, spec: EngineSpec, tensors: Mapping[str, torch.Tensor]) -> None:
        if spec.tp_size > 1 or spec.model is None:
            raise ValueError(
                f"a llama of tp_size {spec.tp_size} with model {spec.model}: this one computes "
                "whole models only; use a fake engine for several ranks"
            )
        self._spec = spec
        self._dtype = TORCH_DTYPES[spec.dtype]
        config = LlamaConfig.from_dict(spec.model)
        weights = fuse_weights(config, tensors, dtype=self._dtype, device=_CPU)
        self._decoder = LlamaDecoder(config, weights, max_model_len=spec.max_seq_len)

    @torch.inference_mode()
    def logits(self, step: EngineStep, memory: KVMemory) -> torch.Tensor:
        """Write the new tokens' K and V; return logits, (S, vocabulary)."""
        logits = self._decoder.forward(
            self._batch(step, memory), _PagedStore(memory, TORCH_DTYPES[self._spec.kv_cache_dtype])
        )
        return logits.to(TORCH_DTYPES[self._spec.logits_dtype])

    def _batch(self, step: EngineStep, memory: KVMemory) -> StepBatch:
        ends = np.cumsum(step.num_new)
        first_generation = int(ends[step.num_contexts - 1]) if step.num_contexts else 0
        groups = []
        if step.num_contexts < len(ends):
            generations = slice(step.num_contexts, len(ends))
            groups.append(
                DecodeGroup(
                    tokens=slice(first_generation, int(ends[-1])),
                    head_rows=self._read_rows(step, memory, generations),
                    mask=self._mask(step, generations)[:, None, None],
                )
            )
        return StepBatch(
            token_ids=torch.from_numpy(step.token_ids),
            positions=torch.from_numpy(step.positions),
            token_rows=torch.from_numpy(self._write_rows(step, memory).reshape(-1)),
            decode_groups=tuple(groups),
            prefill_pieces=tuple(
                PrefillPiece(
                    tokens=slice(int(ends[index] - step.num_new[index]), int(ends[index])),
                    head_rows=self._read_rows(step, memory, slice(index, index + 1)),
                    mask=self._chunk_mask(step, index),
                )
                for index in range(step.num_contexts)
            ),
            sampled=(),
            sampled_rows=torch.from_numpy(ends - 1),
        )

    def _write_rows(self, step: EngineStep, memory: KVMemory) -> Ints:
        """Return where the step's tokens go, (T, 2, heads)."""
        sequences = np.repeat(np.arange(len(step.num_new)), step.num_new)
        places, slots = np.divmod(step.positions, self._spec.tokens_per_block)
        tables = (step.key_offsets, step.value_offsets)
        return np.stack([memory.row_ids(t[sequences, places], slots) for t in tables], axis=1)

    def _read_rows(self, step: EngineStep, memory: KVMemory, sequences: slice) -> torch.Tensor:
        """Return where these sequences have their tokens, (2, sequences, heads, tokens), padded to
        the longest with the first token, whose K and V are numbers."""
        lengths = step.lengths[sequences, None]
        positions = np.arange(lengths.max())
        places, slots = np.divmod(
            np.where(positions < lengths, positions, 0), self._spec.tokens_per_block
        )
        tables = (step.key_offsets[sequences], step.value_offsets[sequences])
        rows = [memory.row_ids(np.take_along_axis(t, places, axis=1), slots) for t in tables]
        return torch.from_numpy(np.stack(rows).swapaxes(2, 3))

    def _mask(self, step: EngineStep, sequences: slice) -> torch.Tensor:
        lengths = step.lengths[sequences]
        return self._hide(np.arange(lengths.max()) >= lengths[:, None])

    def _chunk_mask(self, step: EngineStep, sequence: int) -> torch.Tensor:
        num_new, length = step.num_new[sequence], step.lengths[sequence]
        return self._hide(np.arange(length) > np.arange(length - num_new, length)[:, None])

    def _hide(self, is_hidden: np.ndarray) -> torch.Tensor:
        mask = torch.zeros(is_hidden.shape, dtype=self._dtype)
        return mask.masked_fill_(torch.from_numpy(is_hidden), float("-inf"))


class _PagedStore:
    """K and V of tokens by their rows in the pool; the decoder's `KVStore`."""

    def __init__(self, memory: KVMemory, dtype: torch.dtype) -> None:
        self._memory = memory
        self._rows = memory.rows.view(dtype)

    def write(self, layer: int, token_rows: torch.Tensor, key_value: torch.Tensor) -> None:
        values = key_value.reshape(-1, self._rows.shape[1]).to(self._rows.dtype)
        self._rows[token_rows + self._memory.first_row(layer)] = values

    def read(self, layer: int, head_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self._rows[head_rows + self._memory.first_row(layer)]
        return key, value
