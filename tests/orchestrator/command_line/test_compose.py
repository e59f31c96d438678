"""A node's configuration over a tiny engine directory, whose KV block takes 1,024 bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.command_line.compose import load_engine
from orchestrator.config import NodeConfig
from orchestrator.core.errors import ConfigError, EngineError
from orchestrator.core.ports import EngineCapabilities
from tests.engines.tiny_llama import write_tiny_engine_dir


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    write_tiny_engine_dir(tmp_path / "tiny")
    return tmp_path / "tiny"


def capabilities(engine_dir: Path, **engine: Any) -> EngineCapabilities:
    settings = {"directory": engine_dir, "num_threads": 1, "device_kv_bytes": "100KiB"} | engine
    config = NodeConfig.model_validate({"endpoint_id": "n", "port": 8101, "engine": settings})
    loaded = load_engine(config)
    loaded.engine.close()
    return loaded.engine.capabilities


def test_bytes_become_whole_blocks(engine_dir: Path) -> None:
    found = capabilities(engine_dir, device_kv_bytes="65KiB", host_kv_bytes=130 * 1024 + 1023)

    assert (found.num_device_blocks, found.num_host_blocks) == (65, 130)


def test_there_are_no_host_blocks_unless_asked_for(engine_dir: Path) -> None:
    assert capabilities(engine_dir).num_host_blocks == 0


@pytest.mark.parametrize("key", ["device_kv_bytes", "host_kv_bytes"])
def test_less_than_one_block_is_refused(engine_dir: Path, key: str) -> None:
    message = f"engine.{key} is 1,023, one KV block of 4 tokens takes 1,024; give .* at least that"
    with pytest.raises(ConfigError, match=message):
        capabilities(engine_dir, **{key: 1023})


@pytest.mark.parametrize("key", ["device_kv_bytes", "host_kv_bytes"])
def test_more_than_the_machine_has_is_refused(engine_dir: Path, key: str) -> None:
    message = r"bytes take [\d,]+ of main memory, [\d,]+ are free .*; lower .*" + key
    with pytest.raises(EngineError, match=message):
        capabilities(engine_dir, **{key: "900TiB"})
