"""The embedded engine on the CPU against llama.cpp and transformers, on the same weights.

    python -m benchmarks.engine_cpu

Decodes at batches 1, 8 and 32 with 128 tokens of context each, and prompts of 512 and 2,048
tokens. All engines stay loaded and take turns in each case, several times; a case's time is the
shortest median of a turn. Every step includes the choice of the most likely tokens. llama.cpp is
llama-cpp-python, built here for this machine, on the packaged GGUF file itself.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch

from benchmarks.shared.cpu_engines import (
    ENGINE_DIR,
    Case,
    Decodes,
    OurEngine,
    PeerEngine,
    Prompt,
    gguf_file,
    transformers_engine,
)
from benchmarks.shared.peer_environments import PEERS, NotInstallable, install
from benchmarks.shared.reporting import BENCHMARKS, argument_parser, report
from engines.torch_engine.precision import resolve_dtype
from engines.torch_engine.weights import read_config

Measure = Callable[[Case], list[float]]
"""Returns the seconds of each step of a case."""

LLAMA_CPP = "llama-cpp-python==0.3.36"


def start_peers(num_threads: int, *, quick: bool) -> dict[str, PeerEngine]:
    """Return the engines to compare with that can be had here; `quick` builds none."""
    peers: dict[str, PeerEngine] = {}
    threads = str(num_threads)
    try:
        if quick and not (PEERS / "llama-cpp/.installed").exists():
            raise NotInstallable("llama-cpp: it takes minutes to build; run without --quick")
        python = install("llama-cpp", [LLAMA_CPP]) / "python"
        script = BENCHMARKS / "peers/llama_cpp_engine.py"
        peers["llama.cpp"] = PeerEngine([str(python), str(script), str(gguf_file()), threads])
    except NotInstallable as error:
        print(f"without llama.cpp: {error}", file=sys.stderr)
    for dtype in ("float32", "bfloat16"):
        peers[f"transformers {dtype}"] = transformers_engine(dtype, num_threads)
    return peers


def cases(*, quick: bool) -> list[Case]:
    """Return what is measured."""
    num_steps = 8 if quick else 24
    decodes = [Decodes(batch_size, 128, num_steps) for batch_size in (1, 8, 32)]
    prompts = [Prompt(512)] if quick else [Prompt(512), Prompt(2_048)]
    longer = [] if quick else [Decodes(8, 1_024, num_steps)]
    return [*decodes, *longer, *prompts]


def main() -> None:
    """Run the benchmark."""
    parser = argument_parser(__doc__)
    parser.add_argument("--num-threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="turns of each engine in each case")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    num_rounds = 1 if options.quick else options.rounds
    dtype = resolve_dtype("auto", device="cpu", config=read_config(ENGINE_DIR))
    peers = start_peers(options.num_threads, quick=options.quick)
    engines: dict[str, Measure] = {f"ours {dtype}": OurEngine(dtype).measure}
    if dtype != "float32" and not options.quick:
        engines["ours float32"] = OurEngine("float32").measure
    engines |= {name: peer.measure for name, peer in peers.items()}
    results: dict[str, dict[str, float]] = {}
    for case in cases(quick=options.quick):
        shortest = dict.fromkeys(engines, float("inf"))
        for _ in range(num_rounds):
            for name, measure in engines.items():
                shortest[name] = min(shortest[name], statistics.median(measure(case)))
        results[case.name] = {name: round(case.num_tokens / s, 1) for name, s in shortest.items()}
        print(case.name, results[case.name], file=sys.stderr)
    ours = f"ours {dtype}"
    ratios = {
        case: {name: round(found[ours] / rate, 2) for name, rate in found.items() if name != ours}
        for case, found in results.items()
    }
    versions = {name: peer.version for name, peer in peers.items()}
    for peer in peers.values():
        peer.close()
    report(
        {
            "num_threads": options.num_threads,
            "num_rounds": num_rounds,
            "versions": versions,
            "tokens_per_s": results,
            f"times_as_fast_is_{ours.replace(' ', '_')}": ratios,
        },
        file_name=options.json,
    )


if __name__ == "__main__":
    main()
