"""What bounds a prompt on the CPU: its parts, beside what the processor can multiply.

    python -m benchmarks.cpu_bounds
    python -m benchmarks.cpu_bounds --avx2

The peaks are those of loops with nothing but multiply-adds in float32, and dot products of 8-bit
inputs with 8- and 4-bit weights as the kernels make them, on all cores at once and all in
registers (`shared/cpu_peaks.cpp`, compiled as the kernels are). A token of a prompt costs its
matrix products with all that belongs to them (norms, rotation, SiLU, quantisation), and its
attention, which grows with the context: a step with as many tokens of many short prompts tells
both apart. At the peaks, and with nothing else to do, they would cost `..._at_the_peak_us`. Hugging
Face's transformers computes the same prompts in float32 in the same run: what would be three times
as fast is the aim.

With `--avx2` a processor that has AVX-512 computes without it, as does transformers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, c_float, c_int64
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.shared.cpu_engines import ENGINE_DIR, OurEngine, Prompt, transformers_engine
from benchmarks.shared.reporting import BENCHMARKS, argument_parser, report
from engines.torch_engine import cpu_library
from engines.torch_engine.config import LlamaConfig
from engines.torch_engine.precision import int8_obstacle
from engines.torch_engine.weights import read_config

WITHOUT_AVX512 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
"""For PyTorch and the libraries that it calls."""

NUM_SHORT = 32
"""Prompts, in whose place one long one is computed."""

AIM = 3.0
"""Times transformers."""

LOOPS = {"float32": 16, "4_bits": 64, "8_bits": 64}
"""Each kind of loop, and the numbers that it multiplies at a time."""


def compiled_peaks(folder: Path) -> CDLL:
    """Return the loops, compiled as the kernels are."""
    target = folder / "cpu_peaks.so"
    source = BENCHMARKS / "shared/cpu_peaks.cpp"
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, *cpu_library.COMPILER_FLAGS, f"-I{cpu_library.SOURCES}"]
    subprocess.run([*command, str(source), "-o", str(target)], check=True)
    return CDLL(str(target))


def peaks(num_threads: int, *, seconds: float) -> dict[str, float]:
    """Return the multiplications per second of each loop, in billions, on all threads together."""
    with tempfile.TemporaryDirectory() as name:
        library = compiled_peaks(Path(name))
    library.proserve_vectors_per_round.restype = c_int64
    per_round: int = library.proserve_vectors_per_round()
    found = {}
    for kind, num_lanes in LOOPS.items():
        loop = getattr(library, "proserve_multiply_" + kind.replace("float32", "floats"))
        loop.restype, loop.argtypes = c_float, (c_int64,)
        rate = _rounds_per_s(loop, num_threads, seconds=seconds)
        found[kind] = rate * per_round * num_lanes / 1e9
    return found


def _rounds_per_s(loop: Callable[[int], float], num_threads: int, *, seconds: float) -> float:
    """Return the best of three, all threads together; ctypes lets the others run meanwhile."""
    num_rounds, best = 10_000, 0.0
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(3):
            duration_s = 0.0
            while duration_s < seconds / 2:
                num_rounds *= 2 if duration_s else 1
                started_s = time.perf_counter()
                list(pool.map(loop, [num_rounds] * num_threads))
                duration_s = time.perf_counter() - started_s
            best = max(best, num_threads * num_rounds / duration_s)
    return best


@dataclass(frozen=True, slots=True)
class Model:
    """What a token of the model multiplies."""

    num_products: int
    """By weights."""

    num_context_products: int
    """With one token of its context: queries by keys, weights by values."""


def model_of(config: LlamaConfig) -> Model:
    """Return the numbers for all layers; what follows them, a prompt needs once."""
    num_inputs = 3 * config.intermediate_size + 2 * config.query_size + 2 * config.key_value_size
    return Model(
        num_products=config.num_hidden_layers * config.hidden_size * num_inputs,
        num_context_products=config.num_hidden_layers * 2 * config.query_size,
    )


@dataclass(frozen=True, slots=True)
class TokenCost:
    """What a token costs on average, in a step with one prompt."""

    whole_s: float
    matrices_s: float
    attention_s: float


def token_cost(engine: OurEngine, num_tokens: int, num_rounds: int) -> TokenCost:
    """Return what follows from a prompt, and from a step with the beginnings of others."""
    long_s = short_s = float("inf")
    for _ in range(num_rounds):
        long_s = min(long_s, *engine.measure(Prompt(num_tokens)))
        short_s = min(short_s, engine.beginnings_s(NUM_SHORT, num_tokens // NUM_SHORT))
    # A short prompt's tokens have that part of the context.
    attention_s = (long_s - short_s) / (1 - 1 / NUM_SHORT) / num_tokens
    return TokenCost(long_s / num_tokens, long_s / num_tokens - attention_s, attention_s)


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--num-threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--avx2", action="store_true", help="do without AVX-512")
    options = parser.parse_args()
    if obstacle := int8_obstacle(read_config(ENGINE_DIR)):
        sys.exit(f"there are no kernels to measure: {obstacle}")
    num_rounds, num_threads = 2 if options.quick else 7, options.num_threads
    torch.set_num_threads(num_threads)
    if options.avx2:
        cpu_library.COMPILER_FLAGS = (*cpu_library.COMPILER_FLAGS, "-mno-avx512f")
    found = peaks(num_threads, seconds=0.2 if options.quick else 1.0)
    print("peaks, billions of multiplications a second", found, file=sys.stderr)
    engine = OurEngine("int8")
    peer = transformers_engine("float32", num_threads, WITHOUT_AVX512 if options.avx2 else {})
    model = model_of(read_config(ENGINE_DIR))
    figures = {}
    for prompt in [Prompt(512)] if options.quick else [Prompt(512), Prompt(2_048)]:
        num_tokens = prompt.num_prompt_tokens
        cost = token_cost(engine, num_tokens, num_rounds)
        theirs_s = min(peer.measure(prompt)[0] for _ in range(num_rounds)) / num_tokens
        attention_products = model.num_context_products * num_tokens / 2
        matrices_bound_s = model.num_products / found["4_bits"] / 1e9
        attention_bound_s = attention_products / found["float32"] / 1e9
        bound_s = matrices_bound_s + attention_bound_s
        figures[prompt.name] = {
            "token_us": round(1e6 * cost.whole_s, 1),
            "matrices_us": round(1e6 * cost.matrices_s, 1),
            "matrices_at_the_peak_us": round(1e6 * matrices_bound_s, 1),
            "attention_us": round(1e6 * cost.attention_s, 1),
            "attention_at_the_peak_us": round(1e6 * attention_bound_s, 1),
            "transformers_us": round(1e6 * theirs_s, 1),
            "times_transformers": round(theirs_s / cost.whole_s, 2),
            "times_transformers_at_the_peak": round(theirs_s / bound_s, 2),
            "share_of_the_peak": round(bound_s / cost.whole_s, 2),
            "share_of_the_peak_for_the_aim": round(AIM * bound_s / theirs_s, 2),
        }
        print(prompt.name, figures[prompt.name], file=sys.stderr)
    peer.close()
    report(
        {
            "num_threads": num_threads,
            "with_avx512": "avx512_vnni" in cpu_library.cpu_flags() and not options.avx2,
            "peaks_gmac_per_s": {kind: round(rate, 1) for kind, rate in found.items()},
            **asdict(model),
            **figures,
        },
        file_name=options.json,
    )


if __name__ == "__main__":
    main()
