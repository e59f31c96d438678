"""The TensorRT-LLM that is installed: whether it can run prebuilt engines here."""

from __future__ import annotations

from typing import Literal

import torch

from engines.trtllm.engine_rules import SUPPORTED_VERSION, is_supported_version
from orchestrator.core.errors import EngineError

REFERENCE_SUFFIX = "+reference"
"""Local part of the version of a TensorRT-LLM that computes on the CPU, to test what drives it."""


def check_installation(device: Literal["cpu", "cuda"], *, num_ranks: int = 1) -> None:
    """Raise EngineError, with the way out, unless the TensorRT-LLM that is installed runs
    prebuilt engines of so many ranks on such devices here. Imports it, which takes seconds."""
    try:
        import tensorrt_llm
    # OSError: one of the CUDA libraries that it loads is missing.
    except (ImportError, OSError) as error:
        raise EngineError(
            f"TensorRT-LLM cannot be imported: {error}; install it on a machine with an NVIDIA "
            f"GPU, with `pip install tensorrt-llm=={SUPPORTED_VERSION}`, or serve another engine "
            "(`engine: {kind: torch}`)"
        ) from error
    check_version(tensorrt_llm.__version__, device)
    if device == "cuda":
        # Before any rank loads: loading waits for all of them.
        check_num_devices(torch.cuda.device_count(), num_ranks)


def check_num_devices(num_devices: int, num_ranks: int) -> None:
    """Raise EngineError unless each rank has a CUDA device of its own."""
    if num_devices < num_ranks:
        raise EngineError(
            f"engine.device is cuda, and PyTorch sees {num_devices} CUDA devices on this machine; "
            f"the engine needs {num_ranks}, one for each rank; make more of them visible "
            "(CUDA_VISIBLE_DEVICES), or build the engine with a smaller `checkpoint: {tp_size}`"
        )


def check_version(version: str, device: Literal["cpu", "cuda"]) -> None:
    """Raise EngineError unless this release of TensorRT-LLM runs prebuilt engines on the device."""
    if not is_supported_version(version):
        raise EngineError(
            f"TensorRT-LLM {version} is installed, serving prebuilt engines needs "
            f"{SUPPORTED_VERSION}: it is the last stable release with the engine backend, which "
            "1.3.0rc21 and later no longer have, and the one whose engine inputs this driver was "
            f"written for; install tensorrt-llm=={SUPPORTED_VERSION}, or stay with your release "
            "and serve another engine (`engine: {kind: torch}`)"
        )
    if device == "cpu" and not version.endswith(REFERENCE_SUFFIX):
        raise EngineError(
            f"engine.device is cpu, but TensorRT-LLM {version} runs on CUDA alone; set "
            "engine.device to cuda"
        )
