from __future__ import annotations

import importlib.util

import pytest

from engines.trtllm.installation import check_installation, check_num_devices, check_version
from orchestrator.core.errors import EngineError


@pytest.mark.parametrize(
    ("version", "device"),
    [("1.2.1", "cuda"), ("1.2.1+reference", "cpu"), ("1.2.1+reference", "cuda")],
)
def test_the_supported_release_is_accepted(version: str, device: str) -> None:
    check_version(version, device)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "version", ["1.2.0", "1.2.10", "1.2.1rc1", "1.3.0rc20", "1.3.0rc21", "1.4.0", "0.17.0", ""]
)
def test_other_releases_are_refused_with_the_one_that_works_and_why(version: str) -> None:
    with pytest.raises(EngineError) as caught:
        check_version(version, "cuda")

    for words in (f"TensorRT-LLM {version} is installed", "needs 1.2.1", "last stable release"):
        assert words in str(caught.value)


def test_a_release_for_cuda_is_refused_on_the_cpu() -> None:
    with pytest.raises(EngineError, match=r"engine.device is cpu, but .* set engine.device to cud"):
        check_version("1.2.1", "cpu")


def test_ranks_without_a_device_are_refused_before_any_loads() -> None:
    check_num_devices(2, num_ranks=2)

    with pytest.raises(EngineError, match=r"sees 1 CUDA devices .* the engine needs 2, one for"):
        check_num_devices(1, num_ranks=2)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_llm") is not None, reason="TensorRT-LLM is installed"
)
def test_a_machine_without_tensorrt_llm_is_told_what_to_install() -> None:
    with pytest.raises(EngineError, match=r"cannot be imported: .*tensorrt-llm==1\.2\.1"):
        check_installation("cuda")
