"""A node's configuration over a TensorRT-LLM engine of the stand-ins. One rank's part of a KV
block takes 3 layers x 2 x 2 heads x 4 tokens x 8 numbers x 4 bytes = 1,536 bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engines.trtllm.launch import RankPlace
from orchestrator.command_line.compose import load_engine, load_follower, num_ranks
from orchestrator.config import NodeConfig
from orchestrator.core.errors import ConfigError, EngineDirectoryError, EngineError
from orchestrator.core.ports import EngineCapabilities
from tests.trtllm.reference_engine import fake_spec, write_fake_engine
from tests.trtllm.stand_in_path import stand_ins_importable


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    (tmp_path / "fake").mkdir()
    return write_fake_engine(tmp_path / "fake", fake_spec())


def make_config(engine_dir: Path, node: dict[str, Any], **engine: Any) -> NodeConfig:
    section = {"kind": "trtllm", "directory": engine_dir, "device": "cpu"}
    section |= {"device_kv_bytes": "100KiB"} | engine
    limits = {"max_num_batched_tokens": 256, "max_num_seqs": 16} | node
    return NodeConfig.model_validate({"endpoint_id": "n", "port": 8101, "engine": section} | limits)


def capabilities(
    engine_dir: Path, node: dict[str, Any] | None = None, **engine: Any
) -> EngineCapabilities:
    with stand_ins_importable():
        loaded = load_engine(make_config(engine_dir, node or {}, **engine))
        loaded.engine.close()
    return loaded.engine.capabilities


def test_bytes_become_whole_blocks_and_limits_are_the_nodes(engine_dir: Path) -> None:
    found = capabilities(
        engine_dir,
        {"max_num_seqs": 3, "max_num_batched_tokens": 100, "max_model_len": 50},
        device_kv_bytes=65 * 1536 + 1535,
        host_kv_bytes=130 * 1536,
    )

    assert found == EngineCapabilities(
        block_size_tokens=4,
        num_device_blocks=65,
        num_host_blocks=130,
        max_num_batched_tokens=100,
        max_num_seqs=3,
        max_model_len=50,
        num_layer_groups=1,
        grammar_obstacle=None,  # its build copies the tokenizer
    )


def test_requests_may_be_as_long_as_the_directory_allows(engine_dir: Path) -> None:
    assert capabilities(engine_dir).max_model_len == 256


@pytest.mark.parametrize(
    ("node", "engine", "words"),
    [
        ({"max_num_seqs": 17}, {}, "max_num_seqs is 17, the engine was built with max_batch_size"),
        ({"max_num_batched_tokens": 300}, {}, "max_num_batched_tokens is 300"),
        ({"max_model_len": 257}, {}, r"max_model_len is 257, .* was built for 256"),
        ({}, {"device_kv_bytes": 1535}, "device_kv_bytes is 1,535, one KV block of 4 tokens takes"),
        ({}, {"host_kv_bytes": 1535}, "host_kv_bytes is 1,535, one KV block of 4 tokens takes"),
    ],
)
def test_settings_that_the_engine_cannot_have_are_refused(
    engine_dir: Path, node: dict[str, Any], engine: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        capabilities(engine_dir, node, **engine)


def test_an_engine_has_as_many_processes_as_it_was_built_for(tmp_path: Path) -> None:
    engine_dir = tmp_path / "fake"
    engine_dir.mkdir()
    write_fake_engine(engine_dir, fake_spec(tp_size=4))

    assert num_ranks(make_config(engine_dir, {})) == 4


def test_a_directory_that_cannot_be_read_is_named_when_it_is_loaded(tmp_path: Path) -> None:
    config = make_config(tmp_path / "nowhere", {})

    assert num_ranks(config) == 1
    with pytest.raises(EngineDirectoryError, match="nowhere: no such engine directory"):
        load_engine(config)


def test_an_engine_of_one_process_has_no_other_ranks() -> None:
    section = {"directory": "some", "device_kv_bytes": "1MiB"}
    config = NodeConfig.model_validate({"endpoint_id": "n", "port": 8101, "engine": section})

    assert num_ranks(config) == 1
    with pytest.raises(EngineError, match="kind torch is one process, this is rank 1 of 2"):
        load_follower(config, RankPlace(1, 2, Path("ranks.sock")))
