"""`TorchEngine`: core.ports.Engine over the PyTorch decoder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch

from engines.kv_copies import CopyBlocks, KVCopies, copy_blocks
from engines.kv_pool import KVLayout, KVPool
from engines.kv_sizing import (
    check_blocks_fit,
    free_cuda_bytes,
    free_host_bytes,
    num_blocks_in_free_memory,
)
from engines.manifest import read_manifest
from engines.plan_checks import check_plan, check_transfers
from engines.torch_engine.batch import build_batch
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.model import LlamaDecoder
from engines.torch_engine.weights import fuse_weights, read_config, read_tensors
from orchestrator.core.errors import EngineError, EngineStepError
from orchestrator.core.ports import (
    EngineCapabilities,
    ScheduledRequest,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.sampling import InvalidLogits, SampledToken, Sampler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Precisions by the names that options have for them."""

NUM_LAYER_GROUPS = 4
"""Parts in which onboarded blocks arrive, unless the options say otherwise. Source: xLLM."""


@dataclass(frozen=True, slots=True)
class TorchEngineOptions:
    """How to run an engine directory on this machine."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    """Of weights, computation and KV cache."""

    num_device_blocks: int | None
    """KV blocks on the device; None takes as many as `device_memory_fraction` has room for,
    which only CUDA can."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    """At most the engine directory's."""

    num_threads: int | None = None
    """CPU threads of the whole process; None leaves PyTorch's choice."""

    num_host_blocks: int = 0
    """KV blocks in main memory, for what is offloaded."""

    num_layer_groups: int = NUM_LAYER_GROUPS
    """Parts in which onboarded blocks arrive; no more than the model has layers are made."""

    device_memory_fraction: float = 0.9
    """Share of the device memory that is free after loading the model, above 0 and at most 1.
    The rest is for what a step computes. Read only if `num_device_blocks` is None."""

    def __post_init__(self) -> None:
        lowest = dict.fromkeys(
            ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "num_layer_groups"), 1
        ) | {"num_host_blocks": 0}
        if self.num_device_blocks is not None:
            lowest["num_device_blocks"] = 1
        elif self.device == "cpu":
            raise EngineError("num_device_blocks is not set; on the CPU it must be")
        for name, limit in lowest.items():
            if getattr(self, name) < limit:
                raise EngineError(f"{name} is {getattr(self, name)}, it must be at least {limit}")
        if not 0 < self.device_memory_fraction <= 1:
            raise EngineError(
                f"device_memory_fraction is {self.device_memory_fraction}, "
                "it must be above 0 and at most 1"
            )


def kv_block_bytes(engine_dir: Path, dtype: Literal["float32", "bfloat16"]) -> int:
    """Return the size of one KV block of an engine directory, so that a memory budget can be
    turned into `num_device_blocks` before anything is loaded. Verifies no weights.

    Raises:
        EngineDirectoryError: the directory is missing or its JSON files are damaged.
    """
    manifest = read_manifest(engine_dir, verify_files=False)
    layout = read_config(engine_dir).kv_layout(manifest.block_size_tokens)
    return layout.block_bytes(DTYPES[dtype])


class TorchEngine:
    """Runs steps of a Llama-family model. One thread may use it at a time."""

    def __init__(
        self,
        config: LlamaConfig,
        tensors: Mapping[str, torch.Tensor],
        options: TorchEngineOptions,
        *,
        block_size_tokens: int,
        copy_blocks: CopyBlocks = copy_blocks,
    ) -> None:
        """Put a model with these tensors (Hugging Face names) on its device.

        `copy_blocks` is for tests that delay or break copies.

        Raises:
            EngineError: the options do not fit the model or the machine.
            EngineDirectoryError: `tensors` are not those of `config`.
        """
        if options.max_model_len > config.max_position_embeddings:
            raise EngineError(
                f"max_model_len is {options.max_model_len}, "
                f"the model takes {config.max_position_embeddings} tokens at most"
            )
        if options.device == "cuda" and not torch.cuda.is_available():
            raise EngineError("device is cuda, but PyTorch sees no CUDA device; use cpu")
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)
        self._dtype, self._device = DTYPES[options.dtype], torch.device(options.device)
        weights = fuse_weights(config, tensors, dtype=self._dtype, device=self._device)
        self._decoder = LlamaDecoder(config, weights, max_model_len=options.max_model_len)
        self._pool = self._make_pool(config.kv_layout(block_size_tokens), options)
        num_layer_groups = min(options.num_layer_groups, config.num_hidden_layers)
        self._copies = KVCopies(
            self._pool, num_layer_groups=num_layer_groups, copy_blocks=copy_blocks
        )
        self.capabilities = EngineCapabilities(
            block_size_tokens=block_size_tokens,
            num_device_blocks=len(self._pool.blocks),
            num_host_blocks=options.num_host_blocks,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
            num_layer_groups=num_layer_groups,
        )
        self._sampler = Sampler(config.vocab_size)

    @classmethod
    def load(cls, engine_dir: Path, options: TorchEngineOptions) -> Self:
        """Return an engine that runs a verified engine directory.

        Raises:
            EngineDirectoryError: the directory is missing, damaged, or not a model we run.
            EngineError: the options do not fit the model or the machine.
        """
        manifest = read_manifest(engine_dir)
        if options.max_model_len > manifest.max_model_len:
            raise EngineError(
                f"max_model_len is {options.max_model_len}, "
                f"{engine_dir} was built for {manifest.max_model_len} at most"
            )
        return cls(
            read_config(engine_dir),
            read_tensors(engine_dir),
            options,
            block_size_tokens=manifest.block_size_tokens,
        )

    def step(self, plan: SchedulerOutput) -> StepOutput:
        """Copy and compute one step; see `core.ports.Engine`.

        A request with a token outside of the vocabulary, or whose logits are not numbers, fails
        alone: it is in `failed`. Any other fault ends the whole step; the next one that does not
        fail then tells what became of its copies.

        Raises:
            EngineStepError: names every request of the step.
        """
        started_s = time.perf_counter()
        self._sampler.forget(plan.finished_ids)
        try:
            check_plan(plan, self.capabilities)
            check_transfers(plan, self.capabilities, self._copies.in_flight)
            self._copies.start(plan.transfers)
            failed = self._foreign_tokens(plan.scheduled)
            parts = [part for part in plan.scheduled if part.request_id not in failed]
            if plan.waits_for_transfers:
                self._copies.hold_compute()
            tokens = self._compute(parts, failed) if parts else {}
            if not plan.scheduled:
                self._copies.wait_for_one()
            copies = self._copies.finish_step()
        # What our checks and PyTorch raise; torch.OutOfMemoryError is a RuntimeError.
        except (RuntimeError, ValueError) as error:
            self._copies.give_up_step(plan.transfers, f"step {plan.step_id} failed: {error}")
            raise EngineStepError(
                f"step {plan.step_id} failed: {error}",
                request_ids=[part.request_id for part in plan.scheduled],
            ) from error
        return StepOutput(
            step_id=plan.step_id,
            new_token_ids={request_id: (t.token_id,) for request_id, t in tokens.items()},
            step_s=time.perf_counter() - started_s,
            logprobs={
                request_id: (token.logprobs,)
                for request_id, token in tokens.items()
                if token.logprobs is not None
            },
            completed_transfers=copies.completed,
            failed_transfers=copies.failed,
            copies=copies.figures,
            failed=failed,
        )

    def close(self) -> None:
        """Release the model, the KV pool and the copying threads. No call follows."""
        self._copies.close()
        self._pool.close()
        del self._decoder, self._copies, self._pool
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _foreign_tokens(self, parts: Sequence[ScheduledRequest]) -> dict[str, str]:
        """Return a message for each request with a token that the model does not know."""
        vocab_size = self._decoder.config.vocab_size
        return {
            part.request_id: f"the request holds token ids outside of [0, {vocab_size})"
            for part in parts
            if not 0 <= min(part.token_ids) <= max(part.token_ids) < vocab_size
        }

    @torch.inference_mode()
    def _compute(
        self, parts: Sequence[ScheduledRequest], failed: dict[str, str]
    ) -> dict[str, SampledToken]:
        """Return the new tokens by request id; add to `failed` who got none."""
        batch = build_batch(parts, self._pool.layout, dtype=self._dtype, device=self._device)
        before_layer = self._copies.before_layer if self._copies.waits_by_layer else None
        logits = self._decoder.forward(batch, self._pool, before_layer=before_layer)
        lost = self._without_blocks(parts)
        rows = [row for row, part in enumerate(batch.sampled) if part.request_id not in lost]
        tokens = self._sample(logits, batch.sampled, rows, failed)
        if self._device.type == "cuda":
            # Not the whole device: offloads go on.
            torch.cuda.current_stream(self._device).synchronize()
        return tokens

    def _sample(
        self,
        logits: torch.Tensor,
        sampled: Sequence[ScheduledRequest],
        rows: Sequence[int],
        failed: dict[str, str],
    ) -> dict[str, SampledToken]:
        """Return new tokens for these rows of the logits; add to `failed` who got none."""
        chosen = logits if len(rows) == len(sampled) else logits[rows]
        requests = [sampled[row].request for row in rows]
        try:
            tokens = self._sampler.sample(chosen, requests)
        except InvalidLogits as error:
            failed.update(dict.fromkeys(error.request_ids, str(error)))
            good = [i for i, r in enumerate(requests) if r.request_id not in failed]
            requests = [requests[i] for i in good]
            tokens = self._sampler.sample(chosen[good], requests)
        return {r.request_id: token for r, token in zip(requests, tokens, strict=True)}

    def _without_blocks(self, parts: Sequence[ScheduledRequest]) -> set[str]:
        """Return the requests that read a block whose onboard failed."""
        broken = self._copies.broken_onboards()
        if not broken:
            return set()
        blocks = {block for transfer in broken for block in transfer.device_block_ids}
        return {transfer.request_id for transfer in broken} | {
            part.request_id for part in parts if not blocks.isdisjoint(part.block_ids)
        }

    def _make_pool(self, layout: KVLayout, options: TorchEngineOptions) -> KVPool:
        """Return the KV blocks, in the memory that the weights have left."""
        block_bytes = layout.block_bytes(self._dtype)
        num_blocks, num_main_blocks = options.num_device_blocks, options.num_host_blocks
        keys = "host_kv_bytes"
        if self._device.type == "cuda":
            free_bytes = free_cuda_bytes(self._device)
            num_blocks = num_blocks or num_blocks_in_free_memory(
                free_bytes, options.device_memory_fraction, block_bytes
            )
            check_blocks_fit(
                num_blocks,
                block_bytes,
                free_bytes=free_bytes,
                memory="device",
                keys="device_kv_bytes",
            )
        else:
            assert num_blocks is not None  # or the options would have been refused
            num_main_blocks += num_blocks
            keys = "device_kv_bytes or host_kv_bytes"
        check_blocks_fit(
            num_main_blocks, block_bytes, free_bytes=free_host_bytes(), memory="main", keys=keys
        )
        return KVPool(
            layout,
            num_blocks,
            num_host_blocks=options.num_host_blocks,
            dtype=self._dtype,
            device=self._device,
        )
