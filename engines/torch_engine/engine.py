"""`TorchEngine`: core.ports.Engine over the PyTorch decoder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch

from engines.kv_pool import KVPool
from engines.manifest import read_manifest
from engines.torch_engine.batch import build_batch, check_plan
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

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TorchEngineOptions:
    """How to run an engine directory on this machine."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    """Of weights, computation and KV cache."""

    num_device_blocks: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    """At most the engine directory's."""

    num_threads: int | None = None
    """CPU threads of the whole process; None leaves PyTorch's choice."""

    def __post_init__(self) -> None:
        for name in (
            "num_device_blocks", "max_num_batched_tokens", "max_num_seqs", "max_model_len"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise EngineError(f"{name} is {getattr(self, name)}, it must be at least 1")


def kv_block_bytes(engine_dir: Path, dtype: Literal["float32", "bfloat16"]) -> int:
    """Return the size of one KV block of an engine directory, so that a memory budget can be
    turned into `num_device_blocks` before anything is loaded. Verifies no weights.

    Raises:
        EngineDirectoryError: the directory is missing or its JSON files are damaged.
    """
    manifest = read_manifest(engine_dir, verify_files=False)
    layout = read_config(engine_dir).kv_layout(manifest.block_size_tokens)
    return layout.block_bytes(_DTYPES[dtype])


class TorchEngine:
    """Runs steps of a Llama-family model. One thread may use it at a time."""

    def __init__(
        self,
        config: LlamaConfig,
        tensors: Mapping[str, torch.Tensor],
        options: TorchEngineOptions,
        *,
        block_size_tokens: int,
    ) -> None:
        """Put a model with these tensors (Hugging Face names) on its device.

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
        self.capabilities = EngineCapabilities(
            block_size_tokens=block_size_tokens,
            num_device_blocks=options.num_device_blocks,
            num_host_blocks=0,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
        )
        self._dtype, self._device = _DTYPES[options.dtype], torch.device(options.device)
        weights = fuse_weights(config, tensors, dtype=self._dtype, device=self._device)
        self._decoder = LlamaDecoder(config, weights, max_model_len=options.max_model_len)
        self._pool = KVPool(
            config.kv_layout(block_size_tokens),
            options.num_device_blocks,
            dtype=self._dtype,
            device=self._device,
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
        """Compute one step; see `core.ports.Engine`.

        A request with a token outside of the vocabulary, or whose logits are not numbers, fails
        alone: it is in `failed`. Any other fault ends the whole step.

        Raises:
            EngineStepError: names every request of the step.
        """
        started_s = time.perf_counter()
        self._sampler.forget(plan.finished_ids)
        try:
            check_plan(plan, self.capabilities)
            failed = self._foreign_tokens(plan.scheduled)
            parts = [part for part in plan.scheduled if part.request_id not in failed]
            tokens = self._compute(parts, failed) if parts else {}
        # What our checks and PyTorch raise; torch.OutOfMemoryError is a RuntimeError.
        except (RuntimeError, ValueError) as error:
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
            failed=failed,
        )

    def close(self) -> None:
        """Release the model and the KV pool. No call follows."""
        del self._decoder, self._pool
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
        logits = self._decoder.forward(batch, self._pool)
        requests = [part.request for part in batch.sampled]
        try:
            tokens = self._sampler.sample(logits, requests)
        except InvalidLogits as error:
            failed.update(dict.fromkeys(error.request_ids, str(error)))
            rows = [i for i, r in enumerate(requests) if r.request_id not in failed]
            requests = [requests[row] for row in rows]
            tokens = self._sampler.sample(logits[rows], requests)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return {r.request_id: token for r, token in zip(requests, tokens, strict=True)}
