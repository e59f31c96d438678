"""Builds engines and schedulers from a node's configuration."""

from __future__ import annotations

import structlog

from engines.manifest import MANIFEST_FILE, FileEntry, ProfileConditions, read_manifest
from engines.torch_engine.engine import TorchEngine, TorchEngineOptions, kv_block_bytes
from orchestrator.config import NodeConfig
from orchestrator.core.errors import ConfigError
from orchestrator.core.kv_transfer import CopyProfile
from orchestrator.core.latency import BatchLatencyModel
from orchestrator.core.ports import EngineCapabilities, Scheduler
from orchestrator.core.scheduler_factory import make_scheduler
from orchestrator.executor_process import LoadedEngine

logger = structlog.get_logger(__name__)


def load_engine(config: NodeConfig) -> LoadedEngine:
    """Return the node's engine, loaded and verified, under its scheduler.

    Raises:
        EngineDirectoryError: the engine directory is missing or damaged.
        ConfigError: the directory cannot be served with these settings.
        EngineError: the memory that they ask for is not there.
    """
    section = config.engine
    manifest = read_manifest(section.directory, verify_files=False)  # the engine verifies them
    _warn_of_foreign_profile(config, manifest.profile_conditions)
    max_model_len = config.max_model_len or manifest.max_model_len
    if max_model_len > manifest.max_model_len:
        raise ConfigError(
            f"max_model_len is {max_model_len:,}, engine directory {section.directory} was built "
            f"for {manifest.max_model_len:,}; lower it or build the engine for more"
        )
    num_device_blocks = None
    if section.device_kv_bytes is not None:
        num_device_blocks = _num_blocks(
            config, "device_kv_bytes", section.device_kv_bytes, manifest.block_size_tokens
        )
    num_host_blocks = _num_blocks(
        config, "host_kv_bytes", section.host_kv_bytes, manifest.block_size_tokens
    )
    engine = TorchEngine.load(
        section.directory,
        TorchEngineOptions(
            device=section.device,
            dtype=section.dtype,
            num_device_blocks=num_device_blocks,
            num_host_blocks=num_host_blocks,
            device_memory_fraction=section.device_memory_fraction,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            num_threads=section.num_threads,
        ),
    )
    model = BatchLatencyModel(manifest.latency_profile, config.latency_correction)
    return LoadedEngine(
        engine=engine,
        scheduler=_make_scheduler(config, engine.capabilities, model, manifest.copy_profile),
        model=manifest.model_name,
        latency_profile=manifest.latency_profile,
        manifest_sha256=FileEntry.of(section.directory / MANIFEST_FILE).sha256,
    )


def _warn_of_foreign_profile(config: NodeConfig, measured: ProfileConditions) -> None:
    section = config.engine
    if (section.device, section.dtype) != (measured.device, measured.dtype):
        logger.warning(
            "the latency profile was measured elsewhere; deadlines will be judged wrongly",
            measured_on=f"{measured.device} in {measured.dtype}",
            serving_on=f"{section.device} in {section.dtype}",
            way_out=f"python -m build_scripts.profile_engine {section.directory} "
            f"--device {section.device} --dtype {section.dtype}",
        )


def _make_scheduler(
    config: NodeConfig,
    capabilities: EngineCapabilities,
    model: BatchLatencyModel,
    copies: CopyProfile | None,
) -> Scheduler:
    try:
        scheduler = make_scheduler(
            config.scheduler, config.scheduler_options(), capabilities, model
        )
    except ValueError as error:
        raise ConfigError(f"scheduler {config.scheduler}: {error}") from error
    scheduler.use_kv_options(config.kv_cache, copies)
    return scheduler


def _num_blocks(config: NodeConfig, key: str, size_bytes: int, block_size_tokens: int) -> int:
    """Return how many KV blocks fit into what the configuration's `engine.<key>` gives."""
    block_bytes = kv_block_bytes(config.engine.directory, config.engine.dtype)
    if 0 < size_bytes < block_bytes:
        raise ConfigError(
            f"engine.{key} is {size_bytes:,}, one KV block of {block_size_tokens} tokens takes "
            f"{block_bytes:,}; give the engine at least that"
        )
    return size_bytes // block_bytes
