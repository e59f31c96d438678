"""Prebuilt TensorRT-LLM engines."""
