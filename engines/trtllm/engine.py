"""`TrtLlmEngine`: core.ports.Engine over a prebuilt TensorRT-LLM engine, one step at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from engines.block_copies import CopyBlocks, copy_blocks
from engines.engine_options import EngineOptions
from engines.kv_sizing import check_main_memory
from engines.manifest import read_manifest
from engines.step_runner import StepCopies, StepLogits, StepRunner
from engines.trtllm.engine_config import TrtLlmEngineConfig, check_limits, read_engine_config
from engines.trtllm.installation import check_installation
from engines.trtllm.launch import ALONE, RankPlace
from engines.trtllm.packing import pack_step
from engines.trtllm.rank_group import RankGroup
from engines.trtllm.rank_lines import FollowerLines
from engines.trtllm.rank_messages import RankLoaded, RankReady, TakePool
from engines.trtllm.rank_worker import LoadedRank, RankWorker, kv_block_bytes, kv_layout
from orchestrator.core.errors import EngineDirectoryError, EngineError, EngineLost
from orchestrator.core.ports import (
    EngineCapabilities,
    ScheduledRequest,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.grammars import GrammarCompiler
from orchestrator.sampling import Sampler


def load_rank(engine_dir: Path, options: EngineOptions, place: RankPlace) -> LoadedRank:
    """Return one rank of an engine directory, its engine loaded.

    Raises:
        EngineDirectoryError: the directory is not one that is served.
        ConfigError: the options are beyond what the engine was built for.
        EngineError: this process is not one of the engine's ranks, or the installed TensorRT-LLM
            or the machine cannot run it.
    """
    config = read_engine_config(engine_dir)
    check_limits(
        config,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
    )
    if place.num_ranks != config.tp_size:
        raise EngineError(
            f"{engine_dir} was built for {config.tp_size} ranks (`checkpoint: {{tp_size: ...}}`), "
            f"this process is one of {place.num_ranks}; a node starts them with mpirun, if it is "
            "installed"
        )
    check_installation(options.device, num_ranks=config.tp_size)
    return LoadedRank(engine_dir, config, options, rank=place.rank)


class TrtLlmEngine:
    """Runs steps of a prebuilt engine; of several ranks, this is rank 0. One thread may use it at
    a time."""

    def __init__(
        self,
        engine_dir: Path,
        options: EngineOptions,
        place: RankPlace = ALONE,
        *,
        has_manifest: bool = True,
        copy_blocks: CopyBlocks = copy_blocks,
    ) -> None:
        """Verify and load an engine directory; with several ranks, return once all are ready.

        A build measures an engine before there is a manifest to verify it against: then
        `has_manifest` is False. `copy_blocks` is for tests that delay or break copies.

        Raises:
            EngineDirectoryError: the directory is missing, damaged, or not one that is served.
            ConfigError: the options are beyond what the engine was built for.
            EngineError: the installed TensorRT-LLM, the machine or another rank cannot run it.
        """
        with contextlib.ExitStack() as undo:
            # Others call first and load then, at the same time as this rank.
            self._lines = FollowerLines(place)
            undo.callback(self._lines.close)
            config = read_engine_config(engine_dir)
            grammars = _checked_grammars(engine_dir, config) if has_manifest else None
            self._worker, num_device_blocks = self._load(
                load_rank(engine_dir, options, place), options, kv_block_bytes(config), copy_blocks
            )
            undo.pop_all()
        copies: StepCopies = self._worker.copies
        self._enqueue = self._worker.enqueue
        if self._lines.ranks:
            copies = group = RankGroup(self._worker, self._lines)
            self._enqueue = group.enqueue
        self.capabilities = EngineCapabilities(
            block_size_tokens=config.tokens_per_block,
            num_device_blocks=num_device_blocks,
            num_host_blocks=options.num_host_blocks,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
            num_layer_groups=1,
            grammar_obstacle="it has no manifest" if grammars is None else grammars.obstacle,
        )
        self._layout = kv_layout(config)
        self._max_blocks_per_seq = config.max_blocks_per_seq
        self._is_lost = False
        self._runner = StepRunner(
            self.capabilities,
            copies,
            Sampler(config.vocab_size, grammars),
            compute=self._compute,
        )

    def step(self, plan: SchedulerOutput) -> StepOutput:
        """Copy and compute one step; see `StepRunner.run`.

        Raises:
            EngineStepError: names every request of the step.
            EngineLost: another rank has ended, or failed in a step that this one was part of.
        """
        try:
            with self._worker.on_stream():
                return self._runner.run(plan)
        except EngineLost:
            self._is_lost = True
            raise

    def close(self) -> None:
        """Release the engine and the KV pool, and end the other ranks. No call follows.

        A rank that has lost another one keeps them until its process ends: its device may wait for
        that rank forever, and memory that it uses cannot be released.
        """
        self._lines.close()
        if self._is_lost:
            return
        self._worker.close()
        del self._runner, self._enqueue, self._worker

    def _load(
        self,
        loaded: LoadedRank,
        options: EngineOptions,
        block_bytes: int,
        copy_blocks: CopyBlocks,
    ) -> tuple[RankWorker, int]:
        """Agree with the other ranks on the number of device blocks; return it, and the rank over
        its pool."""
        answers = self._lines.receive(RankLoaded).values()
        num_blocks = min(
            [loaded.count_device_blocks(), *(answer.num_device_blocks for answer in answers)]
        )
        check_main_memory(options, num_blocks, block_bytes * (1 + len(answers)))
        self._lines.send(TakePool(num_blocks))
        worker = loaded.take_pool(num_blocks, copy_blocks=copy_blocks)
        self._lines.receive(RankReady)
        return worker, num_blocks

    def _compute(self, parts: Sequence[ScheduledRequest]) -> StepLogits:
        packed = pack_step(parts, self._layout, max_blocks_per_seq=self._max_blocks_per_seq)
        return StepLogits(packed.sequences, self._enqueue(packed.arrays))


def _checked_grammars(engine_dir: Path, config: TrtLlmEngineConfig) -> GrammarCompiler:
    """Return what compiles grammars for an engine directory, once it is known that its files are
    those that the build wrote, and its manifest the engine's.

    Raises:
        EngineDirectoryError: they are not.
    """
    manifest = read_manifest(engine_dir)
    for name, found, built in (
        ("block_size_tokens", manifest.block_size_tokens, config.tokens_per_block),
        ("vocab_size", manifest.vocab_size, config.vocab_size),
    ):
        if found != built:
            raise EngineDirectoryError(
                f"{engine_dir}: the manifest says {name} {found:,}, the engine was built with "
                f"{built:,}; rebuild the directory with `proserve build`"
            )
    return GrammarCompiler(
        engine_dir, vocab_size=config.vocab_size, end_token_ids=manifest.eos_token_ids
    )
