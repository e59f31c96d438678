"""Names the machine that something was built or measured on."""

from __future__ import annotations

import platform
from pathlib import Path

from orchestrator.core.errors import EngineError


def hardware_name(device: str) -> str:
    """Return the name of the GPU if `device` is "cuda", else of the processor.

    Raises:
        EngineError: there is no GPU.
    """
    if device == "cuda":
        import torch  # takes seconds

        if not torch.cuda.is_available():
            raise EngineError(
                "PyTorch sees no CUDA device here; build and measure on the GPU that is to serve"
            )
        return torch.cuda.get_device_name()
    return _processor_name()


def _processor_name() -> str:
    """Return the processor's marketing name where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.machine()
