"""Copies of many pieces of KV blocks by one call of the CUDA driver.

PyTorch queues one copy per piece, each for several microseconds of the host's time.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engines.block_copies import BlockPieces, CopyBlocks, copy_blocks
from orchestrator.core.kv_transfer import KVTransfer

_LIBRARY = "libcuda.so.1"
# That of CUDA 12.8, which later drivers keep beside those with fewer arguments.
_FUNCTION = "cuMemcpyBatchAsync"
_IN_STREAM_ORDER = 1


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes. The locations matter for managed memory alone."""

    _fields_ = (
        ("source_access_order", ctypes.c_int),
        ("source_location", _Location),
        ("target_location", _Location),
        ("flags", ctypes.c_uint),
    )


def fastest_copies(device: torch.device) -> CopyBlocks:
    """Return how to copy between this device and the host: PyTorch's copies are for CPUs, and for
    drivers without the call."""
    is_possible = device.type == "cuda" and _memcpy_batch() is not None
    return copy_in_batch if is_possible else copy_blocks


def copy_in_batch(_: KVTransfer, pieces: BlockPieces) -> None:
    """Queue all pieces on the current stream.

    Raises:
        RuntimeError: the driver refuses, or does not have the call.
    """
    call = _memcpy_batch()
    if call is None:
        raise RuntimeError(f"the CUDA driver has no {_FUNCTION}; it came with CUDA 12.8")
    targets = piece_addresses(pieces.targets, pieces.target_ids, pieces.layers)
    sources = piece_addresses(pieces.sources, pieces.source_ids, pieces.layers)
    num_layers = pieces.layers.stop - pieces.layers.start
    sizes = np.full(len(targets), num_layers * pieces.sources[0, 0].nbytes, np.uint64)
    attributes = _Attributes(source_access_order=_IN_STREAM_ORDER)
    first_index, failed_index = ctypes.c_size_t(0), ctypes.c_size_t(0)
    error = call(
        targets.ctypes.data_as(ctypes.c_void_p),
        sources.ctypes.data_as(ctypes.c_void_p),
        sizes.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_size_t(len(targets)),
        ctypes.byref(attributes),
        ctypes.byref(first_index),
        ctypes.c_size_t(1),
        ctypes.byref(failed_index),
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
    )
    if error:
        raise RuntimeError(f"{_FUNCTION} of {len(targets)} pieces failed: CUDA error {error}")


def piece_addresses(
    pool: torch.Tensor, block_ids: Sequence[int], layers: slice
) -> NDArray[np.uint64]:
    """Return where the layers of each block begin."""
    block, layer = pool[0].nbytes, pool[0, 0].nbytes
    first = pool.data_ptr() + layers.start * layer
    return np.array(block_ids, np.uint64) * np.uint64(block) + np.uint64(first)


@functools.cache
def _memcpy_batch() -> Any | None:
    try:
        function = getattr(ctypes.CDLL(_LIBRARY), _FUNCTION, None)
    except OSError:  # no driver here
        return None
    if function is not None:
        function.restype = ctypes.c_int
    return function
