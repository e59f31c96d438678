"""Decode speed of Hugging Face's transformers on the shape of `engine_gpu`, for that benchmark.

Its last line is JSON: for each way to run a batch, tokens per second by batch size, or an error.
Continuous batching is timed while all requests decode: between the moment when the last one has
made a few tokens, and the first one its last but few. Prompts enter two by two, and make tokens
meanwhile; so requests make more of them the more they are. `generate` is timed by what more tokens
cost. Without flash-attn, as on this project's GPU machines, transformers takes its paged attention
on PyTorch's own.

python -m benchmarks.gpu.transformers_peer
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.copy_overlap import CONFIG

BATCH_SIZES = (1, 8, 32, 64)
CONTEXT_TOKENS = 1024
BLOCK_SIZE_TOKENS = 64
MAX_BATCH_TOKENS = 2048
# Left out at both ends of what is timed.
NUM_EDGE_TOKENS = 3
MIN_TIMED_STEPS = 8


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**CONFIG.to_dict()))
    torch.set_default_dtype(torch.float32)
    model.train(mode=False)
    return model


def random_prompts(batch_size: int, num_tokens: int) -> list[list[int]]:
    """Return prompts that share no beginning, so that none is computed for two."""
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(
        3, CONFIG.vocab_size, (batch_size, num_tokens), generator=generator
    ).tolist()
    return prompts


def continuous_batching(model: Any, batch_size: int, num_tokens: int) -> float:
    """Return tokens per second; contexts reach CONTEXT_TOKENS in the middle of the run."""
    # Not all of its functions have types.
    generation: Any = importlib.import_module("transformers.generation")
    prompts = random_prompts(batch_size, CONTEXT_TOKENS - num_tokens // 2)
    blocks_per_request = -(-(CONTEXT_TOKENS + num_tokens) // BLOCK_SIZE_TOKENS)
    outputs = model.generate_batch(
        prompts,
        generation_config=generation.GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=generation.ContinuousBatchingConfig(
            block_size=BLOCK_SIZE_TOKENS,
            num_blocks=batch_size * blocks_per_request + 8,
            max_batch_tokens=MAX_BATCH_TOKENS,
            allow_block_sharing=False,
            # Else the last prompts wait until others have ended: there are no blocks to spare.
            safety_margin=0.0,
        ),
        record_timestamps=True,
    )
    stamps = [output.timestamps for output in outputs.values()]
    if len(stamps) != batch_size or any(len(each) != num_tokens for each in stamps):
        raise RuntimeError(f"{[len(each) for each in stamps]} tokens came, of {num_tokens} each")
    begun_s = max(each[NUM_EDGE_TOKENS] for each in stamps)
    ended_s = min(each[-NUM_EDGE_TOKENS] for each in stamps)
    num_timed = sum(sum(begun_s < stamp <= ended_s for stamp in each) for each in stamps)
    if num_timed < MIN_TIMED_STEPS * batch_size:
        raise RuntimeError(
            f"{num_timed} tokens came while all {batch_size} requests decoded, too few to time; "
            f"let each make more than {num_tokens}"
        )
    return float(num_timed / (ended_s - begun_s))


def generate(model: Any, batch_size: int, num_tokens: int) -> float:
    """Return tokens per second of a batch of equal lengths."""
    prompts = torch.tensor(random_prompts(batch_size, CONTEXT_TOKENS - num_tokens // 2)).cuda()

    @torch.inference_mode()
    def duration_s(count: int) -> float:
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        return time.perf_counter() - started_s

    duration_s(2)
    first_s = duration_s(1)
    return batch_size * (num_tokens - 1) / (duration_s(num_tokens) - first_s)


def measure(
    run: Callable[[Any, int, int], float], model: Any, batch_size: int, num_tokens: int
) -> float | str:
    """Return tokens per second, or what went wrong."""
    try:
        return round(run(model, batch_size, num_tokens), 1)
    except Exception as error:  # noqa: BLE001 - another's code on another's machine: told, not raised
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    finally:
        # Continuous batching leaves its own behind when it fails.
        model.set_attn_implementation("sdpa")
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    """Print all that is known after every measurement, for readers who do not wait."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="finish within a minute")
    is_quick = parser.parse_args().quick
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    model = make_model()
    figures: dict[str, Any] = {"version": transformers.__version__}
    for run in (continuous_batching, generate):
        speeds = figures[run.__name__] = {}
        for batch_size in reversed(BATCH_SIZES[1::2] if is_quick else BATCH_SIZES):
            # A token for every prompt's step, and as many again that are timed.
            speeds[str(batch_size)] = measure(run, model, batch_size, batch_size + 32)
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
