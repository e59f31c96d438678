"""Builds engines and schedulers from a node's configuration."""

from __future__ import annotations

import structlog

from engines.engine_options import EngineOptions
from engines.manifest import (
    MANIFEST_FILE,
    EngineManifest,
    FileEntry,
    ProfileConditions,
    read_manifest,
)
from engines.torch_engine.engine import TorchEngine, TorchEngineOptions
from engines.torch_engine.engine import kv_block_bytes as torch_kv_block_bytes
from engines.torch_engine.precision import resolve_dtype
from engines.torch_engine.weights import read_config
from engines.trtllm.engine import TrtLlmEngine, load_rank
from engines.trtllm.engine_config import read_engine_config
from engines.trtllm.executor_engine import TrtLlmExecutorEngine, TrtLlmExecutorOptions
from engines.trtllm.launch import ALONE, RankPlace
from engines.trtllm.rank_worker import LoadedRank
from engines.trtllm.rank_worker import kv_block_bytes as trtllm_kv_block_bytes
from orchestrator.config import (
    NodeConfig,
    TorchEngineConfig,
    TrtLlmEngineSection,
    TrtLlmExecutorConfig,
)
from orchestrator.core.errors import ConfigError, EngineDirectoryError, EngineError
from orchestrator.core.kv_transfer import CopyProfile
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import AheadScheduler, Engine, EngineCapabilities
from orchestrator.core.scheduler_factory import make_scheduler
from orchestrator.executor_process import LoadedEngine, LoadedRequestEngine

logger = structlog.get_logger(__name__)


def load_engine(config: NodeConfig, place: RankPlace = ALONE) -> LoadedEngine | LoadedRequestEngine:
    """Return the node's engine, loaded and verified, under its scheduler.

    `place` is that of rank 0, if the engine has several.

    Raises:
        EngineDirectoryError: the engine directory is missing or damaged.
        ConfigError: the directory cannot be served with these settings.
        EngineError: the memory that they ask for, or the software, is not there.
    """
    match config.engine:
        case TorchEngineConfig() as section:
            return _load_torch_engine(config, section)
        case TrtLlmEngineSection() as section:
            return _load_trtllm_engine(config, section, place)
        case TrtLlmExecutorConfig() as section:
            return _load_trtllm_executor(config, section)


def num_ranks(config: NodeConfig) -> int:
    """Return how many processes of ours compute the node's engine; 1 if its directory cannot be
    read, which loading it will say."""
    if not isinstance(config.engine, TrtLlmEngineSection):
        return 1
    try:
        return read_engine_config(config.engine.directory).tp_size
    except EngineDirectoryError:
        return 1


def load_follower(config: NodeConfig, place: RankPlace) -> LoadedRank:
    """Return a rank of the node's engine that is not rank 0.

    Raises:
        EngineError: as `load_engine`; or the engine has but one rank.
    """
    if not isinstance(config.engine, TrtLlmEngineSection):
        raise EngineError(
            f"an engine of kind {config.engine.kind} is one process, this is rank {place.rank} of "
            f"{place.num_ranks}; start the node without mpirun"
        )
    return load_rank(config.engine.directory, _trtllm_options(config, config.engine), place)


def _load_torch_engine(config: NodeConfig, section: TorchEngineConfig) -> LoadedEngine:
    manifest = read_manifest(section.directory, verify_files=False)  # the engine verifies them
    dtype = resolve_dtype(
        section.dtype, device=section.device, config=read_config(section.directory)
    )
    logger.info("the embedded engine computes", device=section.device, dtype=dtype)
    _warn_of_foreign_profile(
        manifest.profile_conditions,
        device=section.device,
        dtype=dtype,
        way_out=f"python -m build_scripts.profile_engine {section.directory} "
        f"--device {section.device} --dtype {dtype}",
    )
    block_bytes = torch_kv_block_bytes(section.directory, dtype)
    engine = TorchEngine.load(
        section.directory,
        TorchEngineOptions(
            device=section.device,
            dtype=dtype,
            num_device_blocks=_num_device_blocks(section, manifest, block_bytes),
            num_host_blocks=_num_blocks(
                "host_kv_bytes", section.host_kv_bytes, manifest, block_bytes
            ),
            device_memory_fraction=section.device_memory_fraction,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=_max_model_len(config, manifest),
            num_threads=section.num_threads,
        ),
    )
    return _under_scheduler(config, engine, manifest)


def _load_trtllm_engine(
    config: NodeConfig, section: TrtLlmEngineSection, place: RankPlace
) -> LoadedEngine:
    options = _trtllm_options(config, section)
    manifest = read_manifest(section.directory, verify_files=False)  # the engine verifies them
    _warn_of_foreign_profile(
        manifest.profile_conditions,
        device=section.device,
        dtype=read_engine_config(section.directory).dtype,
        way_out="build the engine again on this machine: proserve build --force",
    )
    engine = TrtLlmEngine(section.directory, options, place)
    return _under_scheduler(config, engine, manifest)


def _trtllm_options(config: NodeConfig, section: TrtLlmEngineSection) -> EngineOptions:
    manifest = read_manifest(section.directory, verify_files=False)
    block_bytes = trtllm_kv_block_bytes(read_engine_config(section.directory))
    return EngineOptions(
        device=section.device,
        num_device_blocks=_num_device_blocks(section, manifest, block_bytes),
        num_host_blocks=_num_blocks("host_kv_bytes", section.host_kv_bytes, manifest, block_bytes),
        device_memory_fraction=section.device_memory_fraction,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=_max_model_len(config, manifest),
    )


def _load_trtllm_executor(config: NodeConfig, section: TrtLlmExecutorConfig) -> LoadedRequestEngine:
    manifest = read_manifest(section.directory)
    block_bytes = trtllm_kv_block_bytes(read_engine_config(section.directory))
    engine = TrtLlmExecutorEngine.load(
        section.directory,
        TrtLlmExecutorOptions(
            device=section.device,
            num_device_blocks=_num_device_blocks(section, manifest, block_bytes),
            num_host_blocks=_num_blocks(
                "host_kv_bytes", section.host_kv_bytes, manifest, block_bytes
            ),
            device_memory_fraction=section.device_memory_fraction,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=_max_model_len(config, manifest),
            capacity_policy=section.capacity_policy,
            block_reuse=section.block_reuse,
        ),
    )
    return LoadedRequestEngine(
        engine=engine,
        model=manifest.model_name,
        latency_profile=manifest.latency_profile,
        manifest_sha256=_manifest_sha256(config),
    )


def _max_model_len(config: NodeConfig, manifest: EngineManifest) -> int:
    max_model_len = config.max_model_len or manifest.max_model_len
    if max_model_len > manifest.max_model_len:
        raise ConfigError(
            f"max_model_len is {max_model_len:,}, engine directory {config.engine.directory} was "
            f"built for {manifest.max_model_len:,}; lower it or build the engine for more"
        )
    return max_model_len


def _manifest_sha256(config: NodeConfig) -> str:
    return FileEntry.of(config.engine.directory / MANIFEST_FILE).sha256


def _warn_of_foreign_profile(
    measured: ProfileConditions, *, device: str, dtype: str, way_out: str
) -> None:
    if (device, dtype) != (measured.device, measured.dtype):
        logger.warning(
            "the latency profile was measured elsewhere; deadlines will be judged wrongly",
            measured_on=f"{measured.device} in {measured.dtype}",
            serving_on=f"{device} in {dtype}",
            way_out=way_out,
        )


def _under_scheduler(config: NodeConfig, engine: Engine, manifest: EngineManifest) -> LoadedEngine:
    model = BatchLatencyModel(manifest.latency_profile, config.latency_correction)
    return LoadedEngine(
        engine=engine,
        scheduler=_make_scheduler(config, engine.capabilities, model, manifest.copy_profile),
        model=manifest.model_name,
        latency_profile=manifest.latency_profile,
        manifest_sha256=_manifest_sha256(config),
        plans_ahead=config.plans_ahead(),
    )


def _make_scheduler(
    config: NodeConfig,
    capabilities: EngineCapabilities,
    model: BatchLatencyModel,
    copies: CopyProfile | None,
) -> AheadScheduler:
    try:
        scheduler = make_scheduler(
            config.scheduler, config.scheduler_options(), capabilities, model
        )
    except ValueError as error:
        raise ConfigError(f"scheduler {config.scheduler}: {error}") from error
    scheduler.use_kv_options(config.kv_cache, copies)
    return scheduler


def _num_device_blocks(
    section: TorchEngineConfig | TrtLlmEngineSection | TrtLlmExecutorConfig,
    manifest: EngineManifest,
    block_bytes: int,
) -> int | None:
    """Return how many KV blocks the device gets; None if a share of its memory decides."""
    if section.device_kv_bytes is None:
        return None
    return _num_blocks("device_kv_bytes", section.device_kv_bytes, manifest, block_bytes)


def _num_blocks(key: str, size_bytes: int, manifest: EngineManifest, block_bytes: int) -> int:
    """Return how many KV blocks fit into what the configuration's `engine.<key>` gives."""
    if 0 < size_bytes < block_bytes:
        raise ConfigError(
            f"engine.{key} is {size_bytes:,}, one KV block of {manifest.block_size_tokens} tokens "
            f"takes {block_bytes:,}; give the engine at least that"
        )
    return size_bytes // block_bytes
