"""How fast the embedded engine runs a 7B-shaped model on a GPU, and how far that is from limits.

Random weights in bfloat16. Steps of decodes at a context of 1,024 tokens, and whole prompts; each
step is a call of `TorchEngine.step`, checks, sampling and all. The limit of a decode step is the
memory bandwidth: the bytes of the weights and of the KV cache that it reads, over what a copy
within the device moves in the same run. Then both executor loops over the same engine: what passes
from one step of decodes to the next, and how much of that the model does not need. Beside it,
Hugging Face's transformers on the same shape, in a process of its own: its continuous batching,
and `generate` on a batch of equal lengths.

python -m benchmarks.gpu.engine_gpu
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.copy_overlap import CONFIG, make_part, make_plan, random_tensors
from benchmarks.shared.decode_period import DecodeBatch, decode_period
from benchmarks.shared.reporting import BENCHMARKS, argument_parser, report
from engines.torch_engine import TorchEngine, TorchEngineOptions
from engines.torch_engine.weights import tensor_shapes
from orchestrator.core.latency import LatencyProfile
from orchestrator.core.ports import ScheduledRequest
from orchestrator.executor import ExecutorLoop
from orchestrator.overlapped_loop import OverlappedLoop

CONTEXT_TOKENS = 1024
BATCH_SIZES = (1, 8, 32, 64)
PROMPT_LENGTHS = (512, 2048)
BLOCK_SIZE_TOKENS = 64
NUM_WARM_UP_STEPS = 5


def make_engine() -> TorchEngine:
    num_decode_blocks = max(BATCH_SIZES) * (CONTEXT_TOKENS // BLOCK_SIZE_TOKENS)
    return TorchEngine(
        CONFIG,
        random_tensors(),
        TorchEngineOptions(
            device="cuda",
            dtype="bfloat16",
            num_device_blocks=num_decode_blocks + max(PROMPT_LENGTHS) // BLOCK_SIZE_TOKENS,
            max_num_batched_tokens=max(PROMPT_LENGTHS),
            max_num_seqs=max(BATCH_SIZES),
            max_model_len=4096,
        ),
        block_size_tokens=BLOCK_SIZE_TOKENS,
    )


def copy_bytes_per_s() -> float:
    """Return what a copy within the device moves, bytes read and written."""
    source = torch.randint(-100, 100, (1 << 32,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    seconds = median_device_s(lambda: target.copy_(source), 10)
    return 2 * source.nbytes / seconds


def median_device_s(work: Callable[[], object], num_runs: int) -> float:
    """Return how long the device is at it."""
    durations = []
    for _ in range(num_runs + 2):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        ended.synchronize()
        durations.append(float(begun.elapsed_time(ended)) / 1000)
    return statistics.median(durations[2:])


def decode_parts(batch_size: int) -> list[ScheduledRequest]:
    """Return requests that make their token at the end of the context."""
    num_blocks = CONTEXT_TOKENS // BLOCK_SIZE_TOKENS
    return [
        make_part(f"d{i}", CONTEXT_TOKENS - 1, 1, range(i * num_blocks, (i + 1) * num_blocks))
        for i in range(batch_size)
    ]


def median_step_s(engine: TorchEngine, parts: Sequence[ScheduledRequest], num_steps: int) -> float:
    """Return how long the same step takes, as its caller sees it."""
    durations = []
    for index in range(NUM_WARM_UP_STEPS + num_steps):
        plan = make_plan(index, parts)
        started_s = time.perf_counter()
        output = engine.step(plan)
        durations.append(time.perf_counter() - started_s)
        if len(output.new_token_ids) != len(parts):
            sys.exit(f"a step gave {len(output.new_token_ids)} tokens: {output.failed}")
    return statistics.median(durations[NUM_WARM_UP_STEPS:])


def median_model_s(engine: TorchEngine, parts: Sequence[ScheduledRequest], num_steps: int) -> float:
    """Return how long the device is at a step's model, when it need not wait for the host."""

    @torch.inference_mode()
    def run() -> None:
        for _ in range(num_steps):
            engine._compute(parts)  # noqa: SLF001 - a step without what the host does around it

    return median_device_s(run, 3) / num_steps


def measure_decodes(
    engine: TorchEngine, batch_size: int, num_steps: int, bandwidth: float
) -> dict[str, float]:
    parts = decode_parts(batch_size)
    step_s = median_step_s(engine, parts, num_steps)
    model_s = median_model_s(engine, parts, num_steps)
    bytes_read = weight_bytes() + batch_size * CONTEXT_TOKENS * kv_token_bytes()
    return {
        "tokens_per_s": round(batch_size / step_s, 1),
        "step_ms": round(step_s * 1000, 3),
        "model_ms": round(model_s * 1000, 3),
        "exposed_host_us": round((step_s - model_s) * 1e6, 1),
        "roofline_ms": round(bytes_read / bandwidth * 1000, 3),
        "roofline_share": round(bytes_read / bandwidth / step_s, 3),
    }


def weight_bytes() -> int:
    """Return what every step reads of the weights: all but the table of embeddings."""
    shapes = tensor_shapes(CONFIG)
    del shapes["model.embed_tokens.weight"]
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())


def kv_token_bytes() -> int:
    return 2 * 2 * CONFIG.num_hidden_layers * CONFIG.key_value_size


def measure_prefill(engine: TorchEngine, num_tokens: int, num_steps: int) -> dict[str, float]:
    part = make_part("p", 0, num_tokens, range(num_tokens // BLOCK_SIZE_TOKENS))
    step_s = median_step_s(engine, [part], num_steps)
    teraflops = 2 * num_tokens * (weight_bytes() / 2) / step_s / 1e12
    return {
        "tokens_per_s": round(num_tokens / step_s, 1),
        "step_ms": round(step_s * 1000, 2),
        "matrix_tflop_per_s": round(teraflops, 1),
    }


def measure_loops(engine: TorchEngine, num_steps: int) -> dict[str, dict[str, float]]:
    """Return what the largest batch's decodes take from step to step, in either loop."""
    batch_size = max(BATCH_SIZES)
    model_s = median_model_s(engine, decode_parts(batch_size), num_steps)
    profile = LatencyProfile(
        prefill_quadratic_s=0.0,
        prefill_context_s=0.0,
        prefill_token_s=2.5e-5,
        prefill_cached_s=0.0,
        decode_context_s=0.0,
        decode_token_s=0.0,
        mixed_step_s=model_s,
        decode_step_s=model_s,
    )
    num_tokens = num_steps + batch_size  # the first decode while the last prompts are computed
    batch = DecodeBatch(batch_size, CONTEXT_TOKENS - num_tokens, num_tokens)
    figures = {}
    for name, loop_class in (("plain", ExecutorLoop), ("plan-ahead", OverlappedLoop)):
        measured = decode_period(loop_class, engine, batch, profile)
        figures[name] = {
            "period_ms": round(measured.period_s * 1000, 3),
            "model_ms": round(model_s * 1000, 3),
            "exposed_host_us": round((measured.period_s - model_s) * 1e6, 1),
            "between_steps_us": round(measured.exposed_s * 1e6, 1),
            "launched_share": round(measured.launched_share, 3),
        }
    return figures


def measure_engine(*, is_quick: bool) -> dict[str, Any]:
    bandwidth = copy_bytes_per_s()
    engine = make_engine()
    try:
        num_steps = 20 if is_quick else 100
        return {
            "copy_gb_per_s": round(bandwidth / 1e9, 1),
            "decode": {
                str(size): measure_decodes(engine, size, num_steps, bandwidth)
                for size in BATCH_SIZES
            },
            "loops": measure_loops(engine, num_steps),
            "prefill": {
                str(length): measure_prefill(engine, length, num_steps // 4)
                for length in PROMPT_LENGTHS
            },
        }
    finally:
        engine.close()
        # The peer's process needs the memory.
        del engine
        gc.collect()
        torch.cuda.empty_cache()


def measure_transformers(*, is_quick: bool, timeout_s: int) -> dict[str, Any]:
    """Return what the peer's process reports, or why it does not."""
    command = [sys.executable, "-m", "benchmarks.gpu.transformers_peer"]
    command += ["--quick"] if is_quick else []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=BENCHMARKS.parent,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            errors += f"\nstopped after {timeout_s} s"
    lines = [line for line in output.splitlines() if line.startswith("{")]
    figures: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    if errors:
        print(errors[-3000:], file=sys.stderr)
    if process.returncode != 0:
        figures["error"] = errors.strip().rpartition("\n")[2]
    return figures


def add_ratios(figures: dict[str, Any], peer: dict[str, Any]) -> None:
    """Say how many times as many tokens per second each batch gets."""
    for name, measured in peer.items():
        if isinstance(measured, dict):
            figures["decode_ratio_to_" + name] = {
                size: round(figures["decode"][size]["tokens_per_s"] / tokens_per_s, 2)
                for size, tokens_per_s in measured.items()
                if isinstance(tokens_per_s, float) and tokens_per_s > 0
            }


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--no-transformers", action="store_true", help="leave out what it is compared with"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; PyTorch sees none")
    figures = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "context_tokens": CONTEXT_TOKENS,
        **measure_engine(is_quick=arguments.quick),
    }
    report(figures, file_name=arguments.json)
    if not arguments.no_transformers:
        peer = measure_transformers(
            is_quick=arguments.quick, timeout_s=45 if arguments.quick else 95
        )
        figures["transformers"] = peer
        add_ratios(figures, peer)
        report(figures, file_name=arguments.json)


if __name__ == "__main__":
    main()
