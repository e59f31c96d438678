"""What runs engines."""

from __future__ import annotations

from tensorrt_llm.runtime.session import Session, TensorInfo

__all__ = ["Session", "TensorInfo"]
