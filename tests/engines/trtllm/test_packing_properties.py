"""Random mixed batches, read back by a model of the attention plugin that knows only the arrays
and the documented address formula; the requests' K and V must be where the pool's layout says.

The model writes down each token's K and V as numbers that name the request, the position, the
layer, and K or V, so that a wrong offset, length or position reads somebody else's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engines.kv_pool import KVLayout, KVPool
from engines.trtllm.packing import StepArrays, pack_step
from orchestrator.core.ports import ScheduledRequest
from orchestrator.core.request import Request
from tests.factories import make_request

NUM_BLOCKS = 40
MAX_BLOCKS_PER_SEQ = 9


@dataclass(frozen=True)
class SequenceView:
    """What the plugin makes of one row."""

    token_ids: list[int]
    first_position: int
    num_tokens: int
    """In the cache after the step."""

    offsets: NDArray[np.int32]  # (2, MB)


def sequences_of(arrays: StepArrays) -> Iterator[SequenceView]:
    """Split the batch as the plugin does; assert what it would refuse."""
    assert (np.diff(arrays.host_request_types) >= 0).all()  # contexts are a prefix
    first = 0
    for row, kind in enumerate(arrays.host_request_types):
        past = int(arrays.host_past_key_value_lengths[row])
        length = int(arrays.sequence_length[row])
        context = int(arrays.context_lengths[row])
        if kind == 0:
            num_new = context
            assert past == length
            begin = past - num_new
        else:
            num_new = 1
            assert past == length - 1
            assert 1 <= context <= past  # the prompt is in the cache
            begin = past
        end = first + num_new
        assert arrays.last_token_ids[row] == end
        assert arrays.position_ids[first:end].tolist() == list(range(begin, begin + num_new))
        yield SequenceView(
            arrays.input_ids[first:end].tolist(),
            begin,
            length,
            arrays.kv_cache_block_offsets[0, row],
        )
        first = end
    assert first == len(arrays.input_ids) == len(arrays.position_ids)


class AttentionPluginModel:
    """Reads and writes K and V by address, as the CUDA kernels do."""

    def __init__(self, pool: KVPool) -> None:
        self._layout = pool.layout
        self._pool_pointer = pool.blocks.data_ptr()
        self._memory = pool.blocks.numpy().reshape(-1)
        self._item_bytes = pool.blocks.element_size()

    def step(self, arrays: StepArrays, owners: list[int]) -> None:
        """Store every new token, then check that each sequence reads its own."""
        for view, owner in zip(sequences_of(arrays), owners, strict=True):
            for position in range(view.first_position, view.num_tokens):
                for place, value in self._places(view, owner, position):
                    self._memory[place] = value
        for view, owner in zip(sequences_of(arrays), owners, strict=True):
            for position in range(view.num_tokens):
                for place, value in self._places(view, owner, position):
                    assert self._memory[place] == value

    def _places(
        self, view: SequenceView, owner: int, position: int
    ) -> Iterator[tuple[int, np.float32]]:
        """Yield where each number of one token lies, and which it is."""
        layout = self._layout
        block_bytes = (
            layout.block_size_tokens * layout.num_kv_heads * layout.head_dim * self._item_bytes
        )
        block, token = divmod(position, layout.block_size_tokens)
        for layer in range(layout.num_layers):
            for is_value in (0, 1):
                offset = int(view.offsets[is_value, block])
                assert offset >= 0  # bit 31: the block would be in host memory
                address = self._pool_pointer + layer * 2 * block_bytes + offset * block_bytes
                start = (address - self._pool_pointer) // self._item_bytes
                for head in range(layout.num_kv_heads):
                    place = start + (head * layout.block_size_tokens + token) * layout.head_dim
                    assert 0 <= place < self._memory.size
                    yield place, number(owner, position, layer, is_value, head)


def number(owner: int, position: int, layer: int, is_value: int, head: int) -> np.float32:
    """Return a number of its own, exact in float32: 6 owners, 9 positions, 3 layers, 3 heads."""
    return np.float32((((owner * 9 + position) * 3 + layer) * 2 + is_value) * 3 + head + 1)


class Batches:
    """Requests in all states, their blocks anywhere in the pool, and some of them on the host."""

    def __init__(self, seed: int) -> None:
        draw = self.draw = random.Random(seed)
        self.layout = KVLayout(
            num_layers=draw.randint(1, 3),
            num_kv_heads=draw.randint(1, 3),
            block_size_tokens=draw.choice([1, 2, 4]),
            head_dim=2,
        )
        self.pool = KVPool(self.layout, NUM_BLOCKS, dtype=torch.float32, device=torch.device("cpu"))
        self.plugin = AttentionPluginModel(self.pool)
        self.free = list(range(NUM_BLOCKS))
        self.requests: list[Request] = []
        self.blocks: dict[str, list[int]] = {}
        self.on_host: dict[str, list[torch.Tensor]] = {}
        self.seen: Counter[str] = Counter()
        for owner in range(draw.randint(1, 6)):
            request = make_request(str(owner), num_prompt_tokens=draw.randint(1, 5), max_tokens=4)
            self.requests.append(request)
            self.blocks[request.request_id] = []

    def step(self) -> None:
        parts = []
        for request in self.draw.sample(self.requests, len(self.requests)):
            if request.num_uncomputed_tokens and self.draw.random() < 0.8:
                count = self.draw.randint(1, request.num_uncomputed_tokens)
                if self._grow(request, request.num_computed_tokens + count):
                    blocks = self.blocks[request.request_id]
                    parts.append(
                        ScheduledRequest(request, request.num_computed_tokens, count, blocks)
                    )
        if not parts:
            return
        packed = pack_step(parts, self.layout, max_blocks_per_seq=MAX_BLOCKS_PER_SEQ)
        for view, part in zip(sequences_of(packed.arrays), packed.sequences, strict=True):
            assert view.token_ids == list(part.token_ids)
        self.plugin.step(packed.arrays, [int(part.request_id) for part in packed.sequences])
        self.seen["mixed"] += len(set(packed.arrays.host_request_types.tolist())) == 2
        for part in parts:
            is_sampled = part.is_sampled
            part.request.num_computed_tokens += part.num_new_tokens
            if is_sampled and part.request.num_output_tokens < 4:
                part.request.append_output_token(self.draw.randrange(100), now_s=0.0)

    def preempt(self, request: Request) -> None:
        """Take all blocks; a copy of the full ones may stay behind."""
        name = request.request_id
        num_full = request.num_computed_tokens // self.layout.block_size_tokens
        if self.draw.random() < 0.5:
            self.on_host[name] = [
                self.pool.blocks[block].clone() for block in self.blocks[name][:num_full]
            ]
            self.seen["offloaded"] += bool(num_full)
        self.free += self.blocks[name]
        self.blocks[name] = []
        request.num_computed_tokens = 0

    def onboard(self, request: Request) -> None:
        name = request.request_id
        copies = self.on_host.pop(name, [])
        if self.blocks[name] or len(copies) > len(self.free):
            return
        for copy in copies:
            self.blocks[name].append(self._take_block())
            self.pool.blocks[self.blocks[name][-1]] = copy
        request.num_computed_tokens = len(copies) * self.layout.block_size_tokens
        self.seen["decodes at once"] += bool(copies) and request.num_uncomputed_tokens == 1

    def _grow(self, request: Request, num_tokens: int) -> bool:
        blocks = self.blocks[request.request_id]
        missing = -(-num_tokens // self.layout.block_size_tokens) - len(blocks)
        if missing > len(self.free):
            return False
        blocks += [self._take_block() for _ in range(missing)]
        return True

    def _take_block(self) -> int:
        return self.free.pop(self.draw.randrange(len(self.free)))


def test_every_sequence_reads_and_writes_its_own_blocks() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=60, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    @example(seed=9)  # in which all of it happens, whatever else is drawn
    def live(seed: int) -> None:
        batches = Batches(seed)
        for _ in range(20):
            batches.step()
            request = batches.draw.choice(batches.requests)
            if batches.draw.random() < 0.4:
                batches.preempt(request)
            elif request.num_computed_tokens == 0:
                batches.onboard(request)
        seen.update(batches.seen)

    live()

    # All of it must have happened for the test to mean anything.
    assert all(seen[what] for what in ("mixed", "offloaded", "decodes at once"))
