"""Hugging Face transformers, as a process that measures what it is asked for.

    python transformers_engine.py ENGINE_DIR NUM_THREADS float32|bfloat16

Speaks as `llama_cpp_engine.py` does, on the same weights. A step ends with the most likely tokens.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers


class Session:
    """A model."""

    def __init__(self, engine_dir: str, dtype: str) -> None:
        number = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        self._model: Any = transformers.LlamaForCausalLM.from_pretrained(engine_dir, dtype=number)
        self._model.train(mode=False)

    def decode(self, batch_size: int, num_context_tokens: int, num_steps: int) -> list[float]:
        """Return the duration of each of `num_steps` steps of one token for each sequence."""
        prompts = (
            torch.arange(num_context_tokens)[None] * 11 + torch.arange(batch_size)[:, None] * 37
        )
        output = self._model(prompts % 40_000 + 100, use_cache=True, logits_to_keep=1)
        durations = []
        for _ in range(num_steps):
            started_s = time.perf_counter()
            tokens = output.logits[:, -1].argmax(-1, keepdim=True)
            output = self._model(tokens, past_key_values=output.past_key_values, use_cache=True)
            durations.append(time.perf_counter() - started_s)
        return durations

    def prefill(self, num_prompt_tokens: int) -> list[float]:
        """Return the duration of one prompt, after one to warm up."""
        prompt = (torch.arange(num_prompt_tokens) * 11 % 40_000 + 100)[None]
        durations = []
        for _ in range(2):
            started_s = time.perf_counter()
            self._model(prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            durations.append(time.perf_counter() - started_s)
        return durations[1:]


@torch.inference_mode()
def main() -> None:
    """Answer requests until the input ends."""
    engine_dir, num_threads, dtype = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    session = Session(engine_dir, dtype)
    print(json.dumps({"version": transformers.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        measure = session.prefill if "num_prompt_tokens" in request else session.decode
        print(json.dumps(measure(**request)), flush=True)


if __name__ == "__main__":
    main()
