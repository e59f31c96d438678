"""The all-reduce of several ranks."""

from __future__ import annotations

import torch

from tensorrt_llm.mapping import Mapping
from tests.trtllm import all_reduce
from tests.trtllm.all_reduce import IpcBuffer


class CustomAllReduceHelper:
    """Makes workspaces."""

    POINTERS_PER_RANK = all_reduce.POINTERS_PER_RANK
    POINTERS_OF_COUNTER = all_reduce.POINTERS_OF_COUNTER

    __slots__ = ("workspace",)

    def __init__(self) -> None:
        self.workspace: torch.Tensor | None = None

    @staticmethod
    def max_workspace_size_auto(tp_size: int, support_deterministic: bool = True) -> int:
        """Return the bytes a workspace takes for each rank.

        `support_deterministic` matters upstream where an environment variable asks for that.
        """
        return 16_000_000 if tp_size <= 2 else 8_000_000

    @staticmethod
    def allocate_workspace(mapping: Mapping, size: int) -> tuple[list[IpcBuffer], torch.Tensor]:
        """Return buffers, to be kept as long as they are used, and their pointers."""
        if size < 1:
            raise ValueError(f"size is {size}")
        buffer = IpcBuffer(all_reduce.num_pointers(mapping.tp_size))
        return [buffer], torch.tensor(buffer.pointers, dtype=torch.int64)
