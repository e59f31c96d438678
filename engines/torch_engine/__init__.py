"""The embedded engine: Llama-family models in plain PyTorch, on CPU and CUDA."""

from engines.torch_engine.engine import TorchEngine, TorchEngineOptions, kv_block_bytes

__all__ = ["TorchEngine", "TorchEngineOptions", "kv_block_bytes"]
