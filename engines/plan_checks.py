"""What a step's plan must be before any of it is started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from orchestrator.core.kv_transfer import KVTransfer, TransferDirection
from orchestrator.core.ports import EngineCapabilities, ScheduledRequest, SchedulerOutput


class PlanChecks:
    """Checks what plans for one engine compute. A request's blocks of the step before are not
    looked at again."""

    def __init__(self, limits: EngineCapabilities) -> None:
        self._limits = limits
        self._checked: dict[str, tuple[Sequence[int], int]] = {}

    def check(self, plan: SchedulerOutput, *, is_ahead: bool = False) -> None:
        """Raise ValueError, naming request, value and limit, if what the plan computes breaks the
        contract of `SchedulerOutput` or a limit of the engine. With `is_ahead`, tokens count whose
        values are not known yet."""
        parts, limits = plan.scheduled, self._limits
        if len(parts) > limits.max_num_seqs:
            raise ValueError(
                f"{len(parts)} requests in one step, max_num_seqs {limits.max_num_seqs}"
            )
        if plan.num_new_tokens > limits.max_num_batched_tokens:
            raise ValueError(
                f"{plan.num_new_tokens} new tokens in one step, "
                f"max_num_batched_tokens {limits.max_num_batched_tokens}"
            )
        before, self._checked = self._checked, {}
        for part in parts:
            _check_part(part, limits, is_ahead=is_ahead)
            request_id, blocks = part.request_id, part.block_ids
            known, count = before.get(request_id, (blocks, 0))
            if known is not blocks:
                count = 0
            num_blocks = len(blocks)  # may grow meanwhile, if the next step is being planned
            if count < num_blocks:
                self._check_blocks(request_id, blocks[count:num_blocks])
            self._checked[request_id] = blocks, num_blocks
        if len(self._checked) != len(parts):
            raise ValueError("a request is scheduled twice in one step")

    def _check_blocks(self, request_id: str, blocks: Sequence[int]) -> None:
        if not 0 <= min(blocks) <= max(blocks) < self._limits.num_device_blocks:
            raise ValueError(
                f"request {request_id} is scheduled with a block outside of the pool's "
                f"{self._limits.num_device_blocks}"
            )


def _check_part(part: ScheduledRequest, limits: EngineCapabilities, *, is_ahead: bool) -> None:
    start, end = part.num_computed_tokens, part.num_computed_tokens + part.num_new_tokens
    room_tokens = len(part.block_ids) * limits.block_size_tokens
    num_tokens = part.request.num_tokens if is_ahead else len(part.request.all_token_ids)
    if part.num_new_tokens < 1 or start < 0 or end > num_tokens:
        wrong = f"tokens [{start}, {end}) of {num_tokens}"
    elif end > limits.max_model_len:
        wrong = f"{end} tokens, max_model_len {limits.max_model_len}"
    elif end > room_tokens:
        wrong = f"{end} tokens in {len(part.block_ids)} blocks, which hold {room_tokens}"
    else:
        return
    raise ValueError(f"request {part.request_id} is scheduled with {wrong}")


def check_transfers(
    plan: SchedulerOutput, limits: EngineCapabilities, in_flight: Sequence[KVTransfer]
) -> None:
    """Raise ValueError, naming value and limit, if a transfer is malformed or two users of one
    block would race.

    `in_flight` are copies of earlier steps that have not been reported.
    """
    if plan.transfers and limits.num_host_blocks == 0:
        raise ValueError(
            f"the plan holds {len(plan.transfers)} KV transfers; this engine has no host blocks"
        )
    for transfer in plan.transfers:
        _check_transfer(transfer, limits)
    _check_once("transfer id", [t.transfer_id for t in (*in_flight, *plan.transfers)])
    new_offloads = _of(plan.transfers, TransferDirection.OFFLOAD)
    onboards = _of(plan.transfers, TransferDirection.ONBOARD)
    offloads = [*_of(in_flight, TransferDirection.OFFLOAD), *new_offloads]
    _check_once("device block", _device_blocks(new_offloads), "offloaded")
    _check_once("host block", _host_blocks(offloads), "offloaded to")
    _check_once("device block", _device_blocks(onboards), "onboarded to")
    _check_once("host block", _host_blocks(onboards), "onboarded")
    being_read = set(_device_blocks(offloads))
    for block in _device_blocks(onboards):
        if block in being_read:
            raise ValueError(f"device block {block} is onboarded to while it is offloaded")
    being_written = set(_host_blocks(offloads))
    for block in _host_blocks(onboards):
        if block in being_written:
            raise ValueError(f"host block {block} is onboarded before its offload is reported")
    if being_read:
        for part in plan.scheduled:
            _check_writes(part, being_read, limits.block_size_tokens)


def _check_transfer(transfer: KVTransfer, limits: EngineCapabilities) -> None:
    device, host = transfer.device_block_ids, transfer.host_block_ids
    if not device or len(device) != len(host):
        wrong = f"has {len(device)} device blocks and {len(host)} host blocks"
    elif (block := _outside(device, limits.num_device_blocks)) is not None:
        wrong = f"names device block {block} of {limits.num_device_blocks}"
    elif (block := _outside(host, limits.num_host_blocks)) is not None:
        wrong = f"names host block {block} of {limits.num_host_blocks}"
    else:
        return
    raise ValueError(f"transfer {transfer.transfer_id} of request {transfer.request_id} {wrong}")


def _check_writes(
    part: ScheduledRequest, being_read: Collection[int], block_size_tokens: int
) -> None:
    first = part.num_computed_tokens // block_size_tokens
    last = (part.num_computed_tokens + part.num_new_tokens - 1) // block_size_tokens
    for block in part.block_ids[first : last + 1]:
        if block in being_read:
            raise ValueError(
                f"request {part.request_id} writes to device block {block} while it is offloaded"
            )


def _check_once(kind: str, numbers: Sequence[int], use: str = "used") -> None:
    for number, count in Counter(numbers).items():
        if count > 1:
            raise ValueError(f"{kind} {number} is {use} {count} times at once")


def _outside(blocks: Sequence[int], num_blocks: int) -> int | None:
    return next((block for block in blocks if not 0 <= block < num_blocks), None)


def _of(transfers: Sequence[KVTransfer], direction: TransferDirection) -> list[KVTransfer]:
    return [transfer for transfer in transfers if transfer.direction is direction]


def _device_blocks(transfers: Sequence[KVTransfer]) -> list[int]:
    return [block for transfer in transfers for block in transfer.device_block_ids]


def _host_blocks(transfers: Sequence[KVTransfer]) -> list[int]:
    return [block for transfer in transfers for block in transfer.host_block_ids]
