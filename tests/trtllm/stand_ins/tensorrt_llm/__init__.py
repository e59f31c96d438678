"""Stands in for `tensorrt_llm`: names of tests/trtllm/api_surface.json that stepping an engine
takes."""

from __future__ import annotations

from tests.trtllm.engine_spec import VERSION

__version__ = VERSION
