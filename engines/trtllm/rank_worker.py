"""What every rank of an engine does: its part of the model, over its part of every KV block."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from engines.block_copies import CopyBlocks, copy_blocks
from engines.engine_options import EngineOptions
from engines.kv_copies import KVCopies
from engines.kv_pool import KVLayout, KVPool
from engines.kv_sizing import count_device_blocks
from engines.trtllm.engine_config import TrtLlmEngineConfig
from engines.trtllm.packing import StepArrays
from engines.trtllm.session_driver import SessionDriver
from orchestrator.core.errors import EngineError

# PyTorch stores quantised K and V as bytes; what they mean only the engine knows.
_KV_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.int8,
}

_NUM_BLOCK_OFFSETS = 2**31  # bit 31 of an offset says that the block is in host memory


def kv_layout(config: TrtLlmEngineConfig) -> KVLayout:
    """Return the shape of one rank's part of a KV block."""
    return KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads_per_rank(),
        block_size_tokens=config.tokens_per_block,
        head_dim=config.head_size,
    )


def kv_dtype(config: TrtLlmEngineConfig) -> torch.dtype:
    """Return the element of the KV pool."""
    return _KV_DTYPES[config.kv_cache_dtype]


def kv_block_bytes(config: TrtLlmEngineConfig) -> int:
    """Return the size of one rank's part of a KV block."""
    return kv_layout(config).block_bytes(kv_dtype(config))


class LoadedRank:
    """A rank whose engine is loaded, and that has no KV pool."""

    def __init__(
        self, engine_dir: Path, config: TrtLlmEngineConfig, options: EngineOptions, *, rank: int
    ) -> None:
        """Load the rank's engine; on CUDA, on the GPU of the same number.

        Raises:
            EngineDirectoryError: the engine is not one that is driven here.
            EngineError: the device has no memory for its tensors.
        """
        self._config, self._options = config, options
        self._device, self._stream = torch.device("cpu"), None
        if options.device == "cuda":
            self._device = torch.device("cuda", rank)
            torch.cuda.set_device(self._device)
            # On CUDA's default stream, TensorRT would wait for the device all the time.
            self._stream = torch.cuda.Stream(self._device)
        try:
            with _on(self._stream):
                self._driver = SessionDriver(
                    engine_dir, config, options, rank=rank, device=self._device
                )
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"the device has no memory for the inputs of a step: {error}; "
                "lower max_num_batched_tokens or max_num_seqs"
            ) from error

    def count_device_blocks(self) -> int:
        """Return how many KV blocks there is room for beside the engine.

        Raises:
            EngineError: too few, or fewer than the options ask for.
        """
        num_blocks = count_device_blocks(self._options, kv_block_bytes(self._config), self._device)
        max_blocks = _NUM_BLOCK_OFFSETS // (2 * self._config.num_layers)
        if num_blocks > max_blocks:
            raise EngineError(
                f"{num_blocks:,} KV blocks are more than the {max_blocks:,} that TensorRT-LLM "
                "can tell apart; lower device_kv_bytes or device_memory_fraction"
            )
        return num_blocks

    def take_pool(
        self, num_device_blocks: int, *, copy_blocks: CopyBlocks = copy_blocks
    ) -> RankWorker:
        """Return the rank over a pool of so many KV blocks, the same number on each rank.

        `copy_blocks` is for tests.

        Raises:
            EngineError: the memory is not there.
        """
        with _on(self._stream):
            pool = KVPool(
                kv_layout(self._config),
                num_device_blocks,
                num_host_blocks=self._options.num_host_blocks,
                dtype=kv_dtype(self._config),
                device=self._device,
            )
        self._driver.attach(pool)
        return RankWorker(self._driver, pool, self._stream, copy_blocks=copy_blocks)


class RankWorker:
    """One rank. One thread may use it at a time.

    A step is `copies.start`, then `enqueue` if there is something to compute, then `wait`, then
    `copies.finish_step`; all of it under `on_stream`.
    """

    def __init__(
        self,
        driver: SessionDriver,
        pool: KVPool,
        stream: torch.cuda.Stream | None,
        *,
        copy_blocks: CopyBlocks,
    ) -> None:
        """`driver` reads and writes `pool`; there is a stream if both are on CUDA."""
        self._driver, self._pool, self._stream = driver, pool, stream
        # One group: an engine computes all layers in one call and cannot wait between them.
        self.copies = KVCopies(pool, num_layer_groups=1, copy_blocks=copy_blocks)

    def on_stream(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which work is queued on this rank's stream."""
        return _on(self._stream)

    def enqueue(self, arrays: StepArrays) -> torch.Tensor:
        """Start the computation of a step, behind its onboards; return where its logits will be,
        (num_sequences, vocab_size). They hold until the next call.

        Raises:
            RuntimeError, ValueError: TensorRT refuses the step.
        """
        if self.copies.waits_by_layer:
            # Not `hold_compute`: offloads go on beside the computation.
            self.copies.before_layer(0)
        return self._driver.enqueue(arrays)

    def check_device(self) -> None:
        """Return at once, whatever the device is doing.

        Raises:
            RuntimeError: it has failed; nothing that was queued will end.
        """
        if self._stream is not None:
            self._stream.query()

    def wait(self) -> None:
        """Return when what was queued has been computed; offloads may go on."""
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """Release the engine, the KV pool and the copying threads. No call follows."""
        self.copies.close()
        self._pool.close()
        del self._driver, self._pool, self.copies
        if self._stream is not None:
            torch.cuda.empty_cache()


def _on(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
