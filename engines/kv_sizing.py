"""How many KV blocks a machine has room for."""

from __future__ import annotations

from pathlib import Path

import torch

from engines.engine_options import EngineOptions
from orchestrator.core.errors import EngineError


def free_cuda_bytes(device: torch.device) -> int:
    """Return the memory that a CUDA device can still give."""
    # What PyTorch keeps for later allocations, such as the pieces weights were joined from,
    # counts as used otherwise.
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes


def free_host_bytes() -> int | None:
    """Return the main memory that can be had without swapping; None if the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key == "MemAvailable":
                return int(value.split()[0]) * 1024
    return None


def count_device_blocks(options: EngineOptions, block_bytes: int, device: torch.device) -> int:
    """Return how many KV blocks of this size the device gets, once the model is loaded.

    Raises:
        EngineError: the device has no room for them.
    """
    if device.type != "cuda":
        # Or the options would have been refused. Main memory is checked as a whole.
        assert options.num_device_blocks is not None
        return options.num_device_blocks
    free_bytes = free_cuda_bytes(device)
    num_blocks = options.num_device_blocks or num_blocks_in_free_memory(
        free_bytes, options.device_memory_fraction, block_bytes
    )
    check_blocks_fit(
        num_blocks, block_bytes, free_bytes=free_bytes, memory="device", keys="device_kv_bytes"
    )
    return num_blocks


def check_main_memory(options: EngineOptions, num_device_blocks: int, block_bytes: int) -> None:
    """Raise EngineError if main memory has no room for the KV blocks that shall be in it."""
    num_blocks, keys = options.num_host_blocks, "host_kv_bytes"
    if options.device == "cpu":
        num_blocks, keys = num_blocks + num_device_blocks, "device_kv_bytes or host_kv_bytes"
    check_blocks_fit(
        num_blocks, block_bytes, free_bytes=free_host_bytes(), memory="main", keys=keys
    )


def num_blocks_in_free_memory(free_bytes: int, memory_fraction: float, block_bytes: int) -> int:
    """Return how many blocks fit into this share of the free memory.

    Raises:
        EngineError: not even one.
    """
    num_blocks = int(free_bytes * memory_fraction) // block_bytes
    if num_blocks < 1:
        raise EngineError(
            f"{memory_fraction:.0%} of the {free_bytes:,} bytes of device memory that are free "
            f"after loading the model hold no KV block of {block_bytes:,}; "
            "use a larger device or a smaller model"
        )
    return num_blocks


def check_blocks_fit(
    num_blocks: int, block_bytes: int, *, free_bytes: int | None, memory: str, keys: str
) -> None:
    """Raise EngineError if so many blocks do not fit into the free `memory`, as far as it is
    known; `keys` are what a node's configuration calls their size."""
    if free_bytes is not None and num_blocks * block_bytes > free_bytes:
        raise EngineError(
            f"{num_blocks:,} KV blocks of {block_bytes:,} bytes take {num_blocks * block_bytes:,} "
            f"of {memory} memory, {free_bytes:,} are free after loading the model; lower {keys}"
        )
