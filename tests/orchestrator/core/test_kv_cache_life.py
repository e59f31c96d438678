"""A million random operations on the KV accounting, each followed by a full check.

Beside the accounting a model keeps what every block truly holds: whoever reads a block must find
there what he, or somebody with the same beginning, has written.
"""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.kv_cache import KVCacheManager
from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.request import Request
from tests.factories import make_request

NUM_LIVES, NUM_OPERATIONS = 400, 2_500
BLOCK_TOKENS = 2
MAX_TOKENS = 16

Content = tuple[str, tuple[int, ...]]
"""A client, and all tokens up to the end of a block."""


class Life:
    """Random requests on one manager, and the bytes that a real pool would hold."""

    def __init__(self, seed: int) -> None:
        self.draw = Random(seed)
        self.is_shared = self.draw.random() < 0.5
        self.kv = KVCacheManager(
            num_device_blocks=self.draw.randint(8, 16),
            block_size_tokens=BLOCK_TOKENS,
            num_host_blocks=self.draw.choice([0, 2, 12]),
            enable_prefix_caching=self.is_shared,
        )
        self.device: dict[int, Content] = {}
        self.host: dict[int, Content] = {}
        self.live: dict[str, Request] = {}
        self.under_way: dict[int, KVTransfer] = {}
        self.num_added = 0

    def run(self, num_operations: int) -> None:
        operations = [
            self.add, self.compute, self.compute, self.produce, self.offload, self.preempt,
            self.restore, self.restore, self.end_copy, self.end_copy, self.finish,
        ]  # fmt: skip
        for _ in range(num_operations):
            self.draw.choice(operations)()
            self.kv.check_integrity()

    def settle(self) -> None:
        """End everything; all blocks must come back."""
        while self.under_way:
            self.end_copy()
        for request_id in list(self.live):
            self.kv.forget(request_id)
        self.kv.check_integrity()
        counts = self.kv.counts()
        assert counts.device_used == counts.copying_in == counts.copying_out == 0
        assert counts.device_free + counts.device_cached == self.kv.num_device_blocks
        assert counts.host_free + counts.host_cached == self.kv.num_host_blocks

    def add(self) -> None:
        if len(self.live) == 4:
            return
        # Few tokens and few salts: equal beginnings are common. Some ids come back.
        request = make_request(
            f"r{self.num_added % 7}",
            prompt_token_ids=[self.draw.randrange(2) for _ in range(self.draw.randint(1, 12))],
            max_tokens=MAX_TOKENS,
            cache_salt=self.draw.choice("ab"),
        )
        self.num_added += 1
        if request.request_id not in self.live:
            self.live[request.request_id] = request

    def compute(self) -> None:
        request = self.pick()
        if request is None or not request.num_uncomputed_tokens or self.is_arriving(request):
            return
        num_new = self.draw.randint(1, request.num_uncomputed_tokens)
        end = request.num_computed_tokens + num_new
        block_ids = self.kv.allocate(request.request_id, end)
        if block_ids is None:
            return
        for index in range(request.num_computed_tokens // BLOCK_TOKENS):
            self.check_reads(request, block_ids[index], index)
        first = request.num_computed_tokens // BLOCK_TOKENS
        for index in range(first, -(-end // BLOCK_TOKENS)):
            self.device[block_ids[index]] = self.content(request, index)
        request.num_computed_tokens = end
        self.kv.name_full_blocks(request)

    def produce(self) -> None:
        request = self.pick()
        if request and not request.num_uncomputed_tokens and request.num_tokens < MAX_TOKENS:
            request.append_output_token(self.draw.randrange(2), 0.0)

    def offload(self) -> None:
        request = self.pick()
        if request and not self.is_arriving(request):
            self.begin(self.kv.offload(request, self.draw.randint(0, 5)))

    def preempt(self) -> None:
        request = self.pick()
        if request and not self.is_arriving(request):
            self.begin(self.kv.spill(request, self.draw.randint(0, 5)))
            self.lose(request)

    def restore(self) -> None:
        request = self.pick()
        if request is None or self.is_arriving(request):
            return
        num_full = request.num_computed_tokens // BLOCK_TOKENS
        if self.kv.num_owned_blocks(request.request_id) != num_full:
            return
        restorable = self.kv.restorable(request).up_to(self.draw.randint(0, 6))
        num_taken = self.kv.num_blocks_taken_by(request, restorable)
        num_free = self.kv.num_free_device_blocks
        if not restorable.num_blocks or num_taken > num_free:
            return
        self.begin(self.kv.adopt(request, restorable))
        assert self.kv.num_free_device_blocks == num_free - num_taken
        request.num_computed_tokens += restorable.num_blocks * BLOCK_TOKENS

    def end_copy(self) -> None:
        if not self.under_way:
            return
        transfer = self.under_way.pop(self.draw.choice(list(self.under_way)))
        pairs = list(zip(transfer.device_block_ids, transfer.host_block_ids, strict=True))
        if self.draw.random() < 0.2:
            self.kv.fail(transfer.transfer_id)
            request = self.live.get(transfer.request_id)
            if request and transfer.direction is TransferDirection.ONBOARD:
                self.lose(request)
        else:
            for device_id, host_id in pairs:
                if transfer.direction is TransferDirection.ONBOARD:
                    self.device[device_id] = self.host[host_id]
                else:
                    self.host[host_id] = self.device[device_id]
            self.kv.complete(transfer.transfer_id)

    def finish(self) -> None:
        request = self.pick()
        if request and self.draw.random() < 0.3 and not self.is_arriving(request):
            self.kv.forget(request.request_id)
            del self.live[request.request_id]

    def pick(self) -> Request | None:
        return self.draw.choice(list(self.live.values())) if self.live else None

    def is_arriving(self, request: Request) -> bool:
        """An engine reports copies to the device before the next plan is made."""
        return any(
            t.request_id == request.request_id and t.direction is TransferDirection.ONBOARD
            for t in self.under_way.values()
        )

    def begin(self, transfer: KVTransfer | None) -> None:
        if transfer is not None:
            assert transfer.device_block_ids
            self.under_way[transfer.transfer_id] = transfer

    def lose(self, request: Request) -> None:
        self.kv.free(request.request_id)
        request.num_computed_tokens = 0

    def check_reads(self, request: Request, block_id: int, index: int) -> None:
        held_by, tokens = self.device[block_id]
        wanted_by, wanted = self.content(request, index)
        assert tokens[: len(wanted)] == wanted
        assert held_by == wanted_by

    def content(self, request: Request, index: int) -> Content:
        end = (index + 1) * BLOCK_TOKENS
        return request.spec.cache_salt, tuple(request.all_token_ids[:end])


@settings(max_examples=NUM_LIVES, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_operation_breaks_the_accounting_or_mixes_up_contents(seed: int) -> None:
    life = Life(seed)
    life.run(NUM_OPERATIONS)
    life.settle()


def test_the_random_life_visits_everything() -> None:
    """Guards the test above: copies both ways, failures and shared blocks do occur."""
    seen = set()
    for seed in range(30):
        life = Life(seed)
        for _ in range(300):
            life.run(1)
            counts = life.kv.counts()
            seen |= {name for name in ("copying_out", "copying_in") if getattr(counts, name)}
            owners = [r for r in life.live if life.kv.num_owned_blocks(r)]
            owned = [b for r in owners for b in life.kv.block_ids(r)]
            if len(set(owned)) < len(owned):
                seen.add("shared")
    assert seen == {"copying_out", "copying_in", "shared"}
