"""llama.cpp under its own API, as a process that measures what it is asked for.

    python llama_cpp_engine.py MODEL.gguf NUM_THREADS

reads one JSON object per line, {"batch_size", "num_context_tokens", "num_steps"} for decodes or
{"num_prompt_tokens"} for a prompt, and answers each with the seconds that every step took. Runs in
an environment with llama-cpp-python and nothing of ours. A step ends with the most likely tokens.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np


class Session:
    """A model, and a fresh context for each measurement."""

    def __init__(self, path: str, num_threads: int) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._num_threads = num_threads

    def decode(self, batch_size: int, num_context_tokens: int, num_steps: int) -> list[float]:
        """Return the duration of each of `num_steps` steps of one token for each sequence."""
        context = self._context(batch_size, num_context_tokens + num_steps + 1)
        for sequence in range(batch_size):
            tokens = [
                (sequence * 37 + place * 11) % 40_000 + 100 for place in range(num_context_tokens)
            ]
            self._run(context, [(token, place, sequence) for place, token in enumerate(tokens)], 1)
        durations = []
        tokens = list(range(200, 200 + batch_size))
        for step in range(num_steps):
            started_s = time.perf_counter()
            entries = [(tokens[i], num_context_tokens + step, i) for i in range(batch_size)]
            tokens = self._run(context, entries, batch_size)
            durations.append(time.perf_counter() - started_s)
        llama_cpp.llama_free(context)
        return durations

    def prefill(self, num_prompt_tokens: int) -> list[float]:
        """Return the duration of one prompt, after one to warm up."""
        durations = []
        for _ in range(2):
            context = self._context(1, num_prompt_tokens + 1)
            entries = [(place * 11 % 40_000 + 100, place, 0) for place in range(num_prompt_tokens)]
            started_s = time.perf_counter()
            self._run(context, entries, 1)
            durations.append(time.perf_counter() - started_s)
            llama_cpp.llama_free(context)
        return durations[1:]

    def _context(self, num_sequences: int, tokens_each: int) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = num_sequences * tokens_each
        parameters.n_batch = 2048
        parameters.n_seq_max = num_sequences
        parameters.kv_unified = True
        parameters.n_threads = parameters.n_threads_batch = self._num_threads
        return llama_cpp.llama_init_from_model(self._model, parameters)

    def _run(self, context: Any, entries: list[tuple[int, int, int]], num_logits: int) -> list[int]:
        """Compute (token, position, sequence) entries; return the last ones' next tokens."""
        batch = llama_cpp.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for index, (token, position, sequence) in enumerate(entries):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = index >= len(entries) - num_logits
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError(f"llama_decode failed on {len(entries)} tokens")
        found = []
        for index in range(len(entries) - num_logits, len(entries)):
            pointer = llama_cpp.llama_get_logits_ith(context, index)
            found.append(int(np.ctypeslib.as_array(pointer, (self._vocab_size,)).argmax()))
        llama_cpp.llama_batch_free(batch)
        return found


def main() -> None:
    """Answer requests until the input ends."""
    session = Session(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        measure = session.prefill if "num_prompt_tokens" in request else session.decode
        print(json.dumps(measure(**request)), flush=True)


if __name__ == "__main__":
    main()
