"""A model without weights whose tokens prove that the whole context was read from the KV pool.

The state after a token is a hash of all tokens up to it and their positions. K and V hold the
state, in another code for each layer, K or V, and head. Logits come from a hash over all bytes of
K and V of a sequence, read back through its block table; the state before a chunk is read back too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tests.trtllm.engine_spec import TORCH_DTYPES, EngineSpec
from tests.trtllm.memory import KVMemory
from tests.trtllm.step_checks import EngineStep, Ints

Hashes = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WORD_BYTES = 8
_LOGIT_SCALE = 2.0**-20
"""Logits have 24 random bits, which float32 holds: from 0 to 16."""

_PADDING_LOGIT = 1000.0
"""Larger than any: who does not cut the padded vocabulary off draws a token that does not exist."""


class FakeModel:
    """Computes the steps of one engine; holds no request state."""

    def __init__(self, spec: EngineSpec) -> None:
        if spec.row_bytes % _WORD_BYTES:
            raise ValueError(
                f"a head has {spec.row_bytes} bytes a token, the fake model needs a multiple of "
                f"{_WORD_BYTES}; change head_size"
            )
        self._spec = spec
        num_rows = spec.num_layers * 2 * spec.num_kv_heads_per_rank
        num_words = spec.row_bytes // _WORD_BYTES
        self._codes = _hash(np.arange(1, num_rows * num_words + 1)).reshape(num_rows, num_words)
        self._weights = _hash(self._codes)
        self._vocabulary = _hash(np.arange(spec.vocab_size))

    def logits(self, step: EngineStep, memory: KVMemory) -> torch.Tensor:
        """Write the new tokens' K and V; return logits, (S, padded vocabulary)."""
        words = memory.rows.numpy().view(np.uint64)
        hashes = []
        first = 0
        for sequence, count in enumerate(step.num_new.tolist()):
            rows = self._rows(step, memory, sequence)
            begin = len(rows) - count
            before = words[rows[begin - 1, 0], 0] ^ self._codes[0, 0] if begin else np.uint64(0)
            states = self._states(step.token_ids[first : first + count], begin, before)
            words[rows[begin:]] = self._content(states)
            hashes.append(self._hash_content(words[rows]))
            first += count
        return self._logits(np.concatenate(hashes))

    def tokens(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Return the greedy tokens after a prompt, computed without a pool."""
        token_ids = list(prompt)
        for _ in range(num_tokens):
            states = self._states(np.array(token_ids), 0, np.uint64(0))
            logits = self._logits(self._hash_content(self._content(states)))
            token_ids.append(int(logits[0, : self._spec.vocab_size].argmax()))
        return token_ids[len(prompt) :]

    def _rows(self, step: EngineStep, memory: KVMemory, sequence: int) -> Ints:
        """Return all rows of a sequence, (tokens, layers * 2 * heads)."""
        num_tokens = int(step.lengths[sequence])
        places, slots = np.divmod(np.arange(num_tokens), self._spec.tokens_per_block)
        tables = (step.key_offsets[sequence], step.value_offsets[sequence])
        layer_0 = np.stack([memory.row_ids(table[places], slots) for table in tables], axis=1)
        layers = np.array([memory.first_row(layer) for layer in range(self._spec.num_layers)])
        rows: Ints = layer_0[:, None] + layers[:, None, None]
        return rows.reshape(num_tokens, -1)

    def _states(self, token_ids: Ints, begin: int, before: np.uint64) -> Hashes:
        """Return the states after tokens that stand at positions from `begin` on."""
        positions = np.arange(begin, begin + len(token_ids))
        states: Hashes = before + np.cumsum(_hash((positions << 32) + token_ids), dtype=np.uint64)
        return states

    def _content(self, states: Hashes) -> Hashes:
        """Return K and V of tokens, (tokens, rows of a token, words of a row)."""
        content: Hashes = states[:, None, None] ^ self._codes
        return content

    def _hash_content(self, content: Hashes) -> Hashes:
        """Return one hash of a whole sequence's K and V, as an array of one."""
        of_tokens = (content * self._weights).sum(axis=(1, 2), dtype=np.uint64)
        ordered = _hash(of_tokens + np.arange(len(content), dtype=np.uint64) * _GOLDEN)
        total: Hashes = ordered.sum(dtype=np.uint64, keepdims=True)
        return total

    def _logits(self, hashes: Hashes) -> torch.Tensor:
        bits = _hash(hashes[:, None] ^ self._vocabulary) >> np.uint64(40)
        logits = np.full((len(hashes), self._spec.vocab_size_padded), _PADDING_LOGIT, np.float32)
        logits[:, : self._spec.vocab_size] = bits * _LOGIT_SCALE
        return torch.from_numpy(logits).to(TORCH_DTYPES[self._spec.logits_dtype])


def _hash(numbers: Ints | Hashes) -> Hashes:
    """Return well mixed bits of each number.

    Source: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    """
    bits = (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
