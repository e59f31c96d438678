"""What docs/tensorrt-llm.md shows is what the code takes."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from engines.trtllm_pytorch import PyTorchSchedulerOptions
from orchestrator.config import NodeConfig, TrtLlmExecutorConfig
from tests.factories import make_profile

PAGE = (Path(__file__).parent.parent.parent / "docs/tensorrt-llm.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_node_of_the_comparison_can_be_read() -> None:
    (text,) = (block for block in blocks("yaml") if "trtllm-executor" in block)

    (node,) = (NodeConfig.model_validate(n) for n in yaml.safe_load(text)["nodes"])

    assert isinstance(node.engine, TrtLlmExecutorConfig)
    assert node.engine.host_kv_bytes == 64 * 1024**3


def test_the_options_of_the_pytorch_executor_can_be_made() -> None:
    """All of the example but reading the profile and installing."""
    (text,) = blocks("python")
    imports, _, call = text.partition("profile = ")
    names: dict[str, object] = {"profile": make_profile()}
    exec(imports, names)
    options = eval(call.partition("install(\n")[2].rstrip().removesuffix(")"), names)

    assert isinstance(options, PyTorchSchedulerOptions)
    assert [c.weight for c in options.classes] == [1, 4]
