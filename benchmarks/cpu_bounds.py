"""What bounds a prompt on the CPU: its parts, beside what the processor can multiply.

    python -m benchmarks.cpu_bounds
    python -m benchmarks.cpu_bounds --avx2

The peaks are those of loops with nothing but multiply-adds in float32, and dot products of 8-bit
inputs with 8- and 4-bit weights as the kernels make them, on all cores at once, from the first
cache (`shared/cpu_peaks.cpp`, compiled as the kernels are). A token of a prompt costs its matrix
products with all that belongs to them (norms, rotation, SiLU, quantisation), and its attention,
which grows with the context: two chunks at different places tell both. At the peaks, and with
nothing else to do, it would cost what `at_the_peak` says. Hugging Face's transformers computes the
same prompts in float32 in the same run: what would be three times as fast is the aim.

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

CHUNK_TOKENS, LATER_START = 256, 1_536
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
    """What a token of a prompt costs."""

    alone_s: float
    per_context_token_s: float


def token_cost(engine: OurEngine, num_rounds: int) -> TokenCost:
    """Return what follows from two chunks at different places."""
    first_s = min(engine.chunk_s(0, CHUNK_TOKENS) for _ in range(num_rounds))
    later_s = min(engine.chunk_s(LATER_START, CHUNK_TOKENS) for _ in range(num_rounds))
    per_context_token_s = (later_s - first_s) / (CHUNK_TOKENS * LATER_START)
    alone_s = first_s / CHUNK_TOKENS - per_context_token_s * CHUNK_TOKENS / 2
    return TokenCost(alone_s, per_context_token_s)


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
    cost, model = token_cost(engine, num_rounds), model_of(read_config(ENGINE_DIR))
    figures = {}
    for prompt in [Prompt(512)] if options.quick else [Prompt(512), Prompt(2_048)]:
        num_tokens = prompt.num_prompt_tokens
        ours_s = min(engine.measure(prompt)[0] for _ in range(num_rounds)) / num_tokens
        theirs_s = min(peer.measure(prompt)[0] for _ in range(num_rounds)) / num_tokens
        context = num_tokens / 2
        bound_s = model.num_products / found["4_bits"] / 1e9
        bound_s += context * model.num_context_products / found["float32"] / 1e9
        figures[prompt.name] = {
            "token_us": round(1e6 * ours_s, 1),
            "of_which_matrix_products_us": round(1e6 * cost.alone_s, 1),
            "of_which_attention_us": round(1e6 * context * cost.per_context_token_s, 1),
            "at_the_peak_us": round(1e6 * bound_s, 1),
            "transformers_us": round(1e6 * theirs_s, 1),
            "times_transformers": round(theirs_s / ours_s, 2),
            "times_transformers_at_the_peak": round(theirs_s / bound_s, 2),
            "share_of_the_peak_for_the_aim": round(AIM * bound_s / theirs_s, 2),
        }
        print(prompt.name, figures[prompt.name], file=sys.stderr)
    peer.close()
    matrices = model.num_products / cost.alone_s / 1e9
    attention = model.num_context_products / cost.per_context_token_s / 1e9
    report(
        {
            "num_threads": num_threads,
            "with_avx512": "avx512_vnni" in cpu_library.cpu_flags() and not options.avx2,
            "peaks_gmac_per_s": {kind: round(rate, 1) for kind, rate in found.items()},
            "matrix_products_gmac_per_s": round(matrices, 1),
            "matrix_products_share_of_the_peak": round(matrices / found["4_bits"], 2),
            "attention_gmac_per_s": round(attention, 1),
            "attention_share_of_the_peak": round(attention / found["float32"], 2),
            **asdict(model),
            **figures,
        },
        file_name=options.json,
    )


if __name__ == "__main__":
    main()
