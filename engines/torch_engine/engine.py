"""`TorchEngine`: core.ports.Engine over the PyTorch decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import torch

from engines.block_copies import CopyBlocks
from engines.engine_options import EngineOptions
from engines.kv_copies import KVCopies
from engines.kv_pool import KVLayout, KVPool
from engines.kv_sizing import check_main_memory, count_device_blocks
from engines.manifest import read_manifest
from engines.step_runner import ComputeAhead, StepLogits, StepRunner
from engines.torch_engine.batch import build_batch
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.cpu_decoder import CpuDecoder
from engines.torch_engine.model import LlamaDecoder
from engines.torch_engine.precision import KV_DTYPES, Dtype
from engines.torch_engine.weights import (
    DecoderWeights,
    fuse_weights,
    read_config,
    read_tensors,
)
from orchestrator.core.errors import EngineError
from orchestrator.core.ports import (
    EngineCapabilities,
    ScheduledRequest,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.grammars import GrammarCompiler
from orchestrator.sampling import Sampler

if TYPE_CHECKING:
    from engines.torch_engine.triton_decoder import TritonDecoder

NUM_LAYER_GROUPS = 8
"""Parts in which onboarded blocks arrive, unless the options say otherwise. Of 32 layers, the first
is one. On an H200 more parts cost more than the smaller ones at the end hide
(`benchmarks/gpu/copy_overlap.py`). xLLM has 4 equal ones, of which a quarter cannot hide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchEngineOptions(EngineOptions):
    """How to run an engine directory of the embedded engine on this machine."""

    dtype: Dtype
    """Of weights, computation and KV cache. `int8`, on CPUs with AVX2: matrices in 8 bits,
    or 4 where that loses nothing, and their inputs in 8; the KV cache in bfloat16."""

    num_threads: int | None = None
    """CPU threads of the whole process; None leaves PyTorch's choice."""

    num_layer_groups: int = NUM_LAYER_GROUPS
    """Parts in which onboarded blocks arrive, each larger than the one before; no more than the
    model has layers are made."""

    def __post_init__(self) -> None:
        # super() without arguments does not work in a class with slots before Python 3.14.
        EngineOptions.__post_init__(self)
        if self.num_layer_groups < 1:
            raise EngineError(f"num_layer_groups is {self.num_layer_groups}, it must be at least 1")


class Decoder(Protocol):
    """Computes steps over a KV pool, its own way."""

    def compute(
        self,
        parts: Sequence[ScheduledRequest],
        *,
        before_layer: Callable[[int], None] | None = None,
    ) -> StepLogits:
        """Compute a checked, non-empty plan; the logits may be overwritten by the next.

        `before_layer` is called with each layer's index before the layer touches the pool.
        """
        ...

    @property
    def compute_ahead(self) -> ComputeAhead | None:
        """Computes behind a step whose tokens are not known yet; None if that cannot be done."""
        ...

    def close(self) -> None:
        """Release what it holds. No call follows."""
        ...


class PlainDecoder:
    """The readable decoder, by PyTorch's own operators."""

    compute_ahead = None

    def __init__(self, decoder: LlamaDecoder, pool: KVPool) -> None:
        self._decoder, self._pool = decoder, pool

    def compute(
        self,
        parts: Sequence[ScheduledRequest],
        *,
        before_layer: Callable[[int], None] | None = None,
    ) -> StepLogits:
        """See `Decoder`."""
        blocks = self._pool.blocks
        batch = build_batch(parts, self._pool.layout, dtype=blocks.dtype, device=blocks.device)
        logits = self._decoder.forward(batch, self._pool, before_layer=before_layer)
        return StepLogits(batch.sampled, logits)

    def close(self) -> None:
        """See `Decoder`."""


def kv_block_bytes(engine_dir: Path, dtype: Dtype) -> int:
    """Return the size of one KV block of an engine directory, so that a memory budget can be
    turned into `num_device_blocks` before anything is loaded. Verifies no weights.

    Raises:
        EngineDirectoryError: the directory is missing or its JSON files are damaged.
    """
    manifest = read_manifest(engine_dir, verify_files=False)
    layout = read_config(engine_dir).kv_layout(manifest.block_size_tokens)
    return layout.block_bytes(KV_DTYPES[dtype])


class TorchEngine:
    """Runs steps of a Llama-family model. One thread may use it at a time; another one may call
    `launch_ahead` meanwhile."""

    def __init__(
        self,
        config: LlamaConfig,
        tensors: Mapping[str, torch.Tensor],
        options: TorchEngineOptions,
        *,
        block_size_tokens: int,
        grammars: GrammarCompiler | None = None,
        copy_blocks: CopyBlocks | None = None,
    ) -> None:
        """Put a model with these tensors (Hugging Face names) on its device.

        Without `grammars`, requests with a grammar are refused. `copy_blocks` is for tests that
        delay or break copies, and for comparisons; None takes the machine's fastest way.

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
        if options.device == "cuda" and options.dtype == "int8":
            raise EngineError("dtype is int8, which only the CPU computes with; use bfloat16")
        self._dtype, self._device = KV_DTYPES[options.dtype], torch.device(options.device)
        compute_dtype = torch.float32 if options.dtype == "int8" else self._dtype
        weights = fuse_weights(config, tensors, dtype=compute_dtype, device=self._device)
        self._pool = self._make_pool(config.kv_layout(block_size_tokens), options)
        self._decoder = self._make_decoder(config, weights, options)
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
            grammar_obstacle="it has no tokenizer" if grammars is None else grammars.obstacle,
        )
        draw_on_cpu = self._decoder.draw if isinstance(self._decoder, CpuDecoder) else None
        self._runner = StepRunner(
            self.capabilities,
            self._copies,
            Sampler(config.vocab_size, grammars, draw_on_cpu=draw_on_cpu),
            compute=self._compute,
            compute_ahead=self._decoder.compute_ahead,
        )

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
        config = read_config(engine_dir)
        grammars = GrammarCompiler(
            engine_dir, vocab_size=config.vocab_size, end_token_ids=manifest.eos_token_ids
        )
        return cls(
            config,
            read_tensors(engine_dir),
            options,
            block_size_tokens=manifest.block_size_tokens,
            grammars=grammars,
        )

    def step(self, plan: SchedulerOutput) -> StepOutput:
        """Copy and compute one step; see `StepRunner.run`.

        Raises:
            EngineStepError: names every request of the step.
        """
        return self._runner.run(plan)

    def launch_ahead(self, plan: SchedulerOutput) -> bool:
        """Begin a step behind the one that runs, on CUDA; see `StepRunner.launch_ahead`."""
        return self._runner.launch_ahead(plan)

    def close(self) -> None:
        """Release the model, the KV pool and the copying threads. No call follows."""
        self._runner.close()
        self._copies.close()
        self._decoder.close()
        self._pool.close()
        del self._runner, self._decoder, self._copies, self._pool
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _compute(self, parts: Sequence[ScheduledRequest]) -> StepLogits:
        before_layer = self._copies.before_layer if self._copies.waits_by_layer else None
        return self._decoder.compute(parts, before_layer=before_layer)

    def _make_decoder(
        self, config: LlamaConfig, weights: DecoderWeights, options: TorchEngineOptions
    ) -> Decoder:
        limits = {
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "max_model_len": options.max_model_len,
        }
        if self._device.type == "cuda":
            return _triton_decoder(config, weights, self._pool, limits)
        if options.dtype == "int8":
            return CpuDecoder(config, weights, self._pool, **limits)
        decoder = LlamaDecoder(config, weights, max_model_len=options.max_model_len)
        return PlainDecoder(decoder, self._pool)

    def _make_pool(self, layout: KVLayout, options: TorchEngineOptions) -> KVPool:
        """Return the KV blocks, in the memory that the weights have left."""
        block_bytes = layout.block_bytes(self._dtype)
        num_blocks = count_device_blocks(options, block_bytes, self._device)
        check_main_memory(options, num_blocks, block_bytes)
        return KVPool(
            layout,
            num_blocks,
            num_host_blocks=options.num_host_blocks,
            dtype=self._dtype,
            device=self._device,
        )


def _triton_decoder(
    config: LlamaConfig, weights: DecoderWeights, pool: KVPool, limits: Mapping[str, int]
) -> TritonDecoder:
    # Imported here because PyTorch for the CPU comes without Triton.
    try:
        from engines.torch_engine.triton_decoder import TritonDecoder
    except ModuleNotFoundError as error:
        raise EngineError(
            f"device is cuda, which needs the package {error.name}; install it, or use cpu"
        ) from error
    return TritonDecoder(config, weights, pool, **limits)
