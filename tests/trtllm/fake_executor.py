"""TensorRT-LLM's C++ Executor without TensorRT-LLM: its queue, priorities, pauses and responses.

What it models, by executorImpl.cpp and capacityScheduler.cpp:

- queue and active requests in descending priority, first come first served among equals; beside the
  free places, a queued request is activated if its priority exceeds the lowest active one;
- MAX_UTILIZATION: in that order each request gets its KV blocks, a prompt's all at once; if there
  are too few, the last started request is paused, which frees its blocks and makes a prompt of
  all its tokens;
- prompts are computed in chunks of what a step has left;
- a request that is cancelled ends with a response of its own, in the queue only once it is active.

Token i of a request is `prompt[0] + i`, so that a test knows every token; a prompt that ends with
RAISE, REFUSE or EXIT of `tests.scripted_engine` makes the step that computes it misbehave.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.scripted_engine import EXIT, RAISE, REFUSE
from tests.trtllm.stub_modules import Stubs

BINDINGS = "tensorrt_llm.bindings.executor"


class RequestArguments:
    """What a Request was constructed with: most of it cannot be read back from the real one."""

    def __init__(self, input_token_ids: Sequence[int], max_tokens: int, **options: Any) -> None:
        self.prompt = list(input_token_ids)
        self.max_new_tokens = max_tokens
        self.priority_value: float = options.get("priority", 0.5)
        self.stops = {stop[0] for stop in options.get("stop_words") or []}


@dataclass(eq=False)
class _Sequence:
    """A request inside the executor."""

    executor_id: int
    request: RequestArguments
    output: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_blocks: int = 0
    num_pauses: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt) + len(self.output)


class FakeExecutor:
    """Implements the Executor of the stub modules. `step` computes one iteration.

    A thread of its own steps it, as the real one's does; without one, it makes a step whenever
    somebody waits for responses.
    """

    def __init__(
        self,
        stubs: Stubs,
        config: Any,
        *,
        tokens_per_block: int,
        num_blocks: int,
        step_s: float | None,
    ) -> None:
        """With `step_s`, a thread is started in which each step takes that long."""
        self._stubs = stubs
        self._bindings = stubs.find(BINDINGS)
        self._max_batch_size: int = config.max_batch_size
        self._max_num_tokens: int = config.max_num_tokens
        policy = config.scheduler_config.capacity_scheduler_policy
        assert policy is self._bindings.CapacitySchedulerPolicy.MAX_UTILIZATION
        self._tokens_per_block = tokens_per_block
        self._num_blocks = num_blocks
        self._lock = threading.Condition()
        self._queue: list[_Sequence] = []
        self._active: list[_Sequence] = []
        self._cancelled: set[int] = set()
        self._responses: list[Any] = []
        self._stats: list[Any] = []
        self._next_id = 1
        self._num_iterations = 0
        self.pauses: list[int] = []
        """Ids of paused requests, in the order in which they were paused."""

        self.is_shut_down = False
        self._has_thread = step_s is not None
        if step_s is not None:
            threading.Thread(target=self._run, args=(step_s,), daemon=True).start()

    # --- the calls of the bindings ---

    def enqueue_request(self, request: Any) -> int:
        with self._lock:
            sequence = _Sequence(self._next_id, request.stub_implementation)
            self._next_id += 1
            _insert(self._queue, sequence)
            self._lock.notify_all()
            return sequence.executor_id

    def cancel_request(self, id: int) -> None:
        with self._lock:
            self._cancelled.add(id)

    def await_responses(self, timeout: timedelta) -> list[Any]:
        with self._lock:
            if not self._has_thread:
                self.step()
            self._lock.wait_for(lambda: self._responses, timeout.total_seconds())
            responses, self._responses = self._responses, []
            return responses

    def get_latest_iteration_stats(self) -> list[Any]:
        with self._lock:
            stats, self._stats = self._stats, []
            return stats

    def can_enqueue_requests(self) -> bool:
        return not self.is_shut_down

    def shutdown(self) -> None:
        with self._lock:
            self.is_shut_down = True
            self._lock.notify_all()

    # --- the executor's own loop ---

    def _run(self, step_s: float) -> None:
        while not self.is_shut_down:
            with self._lock:
                self._lock.wait_for(lambda: self._queue or self._active or self.is_shut_down)
            time.sleep(step_s)
            self.step()

    def step(self) -> None:
        """Compute one iteration: activate, pause, compute, respond."""
        with self._lock:
            self._activate()
            self._end_cancelled()
            num_pauses = len(self.pauses)
            fitting = self._allocate()
            try:
                num_context_tokens, computed = self._compute(fitting)
            except ZeroDivisionError as error:  # what a broken kernel does to all that are active
                self._fail(list(self._active), f"Encountered an error in forwardSync: {error}")
                num_context_tokens, computed = 0, []
            self._note(computed, num_context_tokens, len(self.pauses) - num_pauses)
            self._lock.notify_all()

    def _activate(self) -> None:
        while self._queue:
            has_place = len(self._active) < self._max_batch_size
            first = self._queue[0]
            if not has_place and _priority(first) <= _priority(self._active[-1]):
                return
            _insert(self._active, self._queue.pop(0))

    def _end_cancelled(self) -> None:
        for sequence in [s for s in self._active if s.executor_id in self._cancelled]:
            self._cancelled.discard(sequence.executor_id)
            self._end(sequence, [], self._bindings.FinishReason.CANCELLED)

    def _allocate(self) -> list[_Sequence]:
        """Give KV blocks in order and return who has enough; pause from the tail."""
        fitting = []
        candidates = list(self._active)
        while candidates:
            sequence = candidates.pop(0)
            num_missing = -(-sequence.num_tokens // self._tokens_per_block) - sequence.num_blocks
            while num_missing > self._num_free_blocks:
                started = [s for s in candidates if s.num_blocks]
                if not started:
                    break
                self._pause(started[-1])
            if num_missing > self._num_free_blocks:
                if sequence.num_blocks:
                    self._pause(sequence)
                break
            sequence.num_blocks += num_missing
            fitting.append(sequence)
        return fitting[: self._max_batch_size]

    def _compute(self, fitting: list[_Sequence]) -> tuple[int, list[_Sequence]]:
        """Compute chunks and tokens; return the number of context tokens, and who computed."""
        num_left = self._max_num_tokens
        num_context_tokens = 0
        computed = []
        for sequence in fitting:
            num_new = min(num_left, sequence.num_tokens - sequence.num_computed)
            if num_new == 0:
                break
            num_left -= num_new
            is_context = not sequence.output or num_new > 1
            num_context_tokens += num_new if is_context else 0
            sequence.num_computed += num_new
            computed.append(sequence)
        for sequence in computed:
            self._misbehave(sequence)
        for sequence in [s for s in computed if s in self._active]:
            if sequence.num_computed == sequence.num_tokens:
                self._produce(sequence)
        return num_context_tokens, computed

    def _misbehave(self, sequence: _Sequence) -> None:
        match sequence.request.prompt[-1]:
            case n if n == RAISE:
                raise ZeroDivisionError("as the prompt asked")
            case n if n == EXIT:
                os.kill(os.getpid(), signal.SIGKILL)
            case n if n == REFUSE:
                self._fail([sequence], "as the prompt asked")

    def _produce(self, sequence: _Sequence) -> None:
        token_id = sequence.request.prompt[0] + len(sequence.output)
        sequence.output.append(token_id)
        reasons = self._bindings.FinishReason
        if token_id in sequence.request.stops:
            self._end(sequence, [token_id], reasons.STOP_WORDS)
        elif len(sequence.output) == sequence.request.max_new_tokens:
            self._end(sequence, [token_id], reasons.LENGTH)
        else:
            self._respond(sequence, [token_id], reasons.NOT_FINISHED)

    def _pause(self, sequence: _Sequence) -> None:
        sequence.num_computed = sequence.num_blocks = 0
        sequence.num_pauses += 1
        self.pauses.append(sequence.executor_id)

    def _end(self, sequence: _Sequence, token_ids: list[int], reason: Any) -> None:
        self._active.remove(sequence)
        self._respond(sequence, token_ids, reason)

    def _fail(self, sequences: list[_Sequence], message: str) -> None:
        for sequence in sequences:
            self._active.remove(sequence)
            response = self._stubs.make(
                f"{BINDINGS}.Response",
                _HasError(is_error=True),
                request_id=sequence.executor_id,
                error_msg=message,
            )
            self._responses.append(response)

    def _respond(self, sequence: _Sequence, token_ids: list[int], reason: Any) -> None:
        result = self._stubs.make(
            f"{BINDINGS}.Result",
            is_final=reason is not self._bindings.FinishReason.NOT_FINISHED,
            output_token_ids=[token_ids],
            finish_reasons=[reason],
        )
        response = self._stubs.make(
            f"{BINDINGS}.Response",
            _HasError(is_error=False),
            request_id=sequence.executor_id,
            result=result,
        )
        self._responses.append(response)

    @property
    def _num_free_blocks(self) -> int:
        return self._num_blocks - sum(s.num_blocks for s in self._active)

    def _note(self, computed: list[_Sequence], num_context_tokens: int, num_paused: int) -> None:
        self._num_iterations += 1
        num_generating = sum(len(s.output) > 1 for s in computed)
        batch = self._stubs.make(
            f"{BINDINGS}.InflightBatchingStats",
            num_scheduled_requests=len(computed),
            num_context_requests=len(computed) - num_generating,
            num_gen_requests=num_generating,
            num_ctx_tokens=num_context_tokens,
            num_paused_requests=num_paused,
        )
        blocks = self._stubs.make(
            f"{BINDINGS}.KvCacheStats",
            max_num_blocks=self._num_blocks,
            free_num_blocks=self._num_free_blocks,
        )
        stats = self._stubs.make(
            f"{BINDINGS}.IterationStats",
            iter=self._num_iterations,
            iter_latency_ms=2.0,
            num_active_requests=len(self._active),
            num_queued_requests=len(self._queue),
            inflight_batching_stats=batch,
            kv_cache_stats=blocks,
        )
        self._stats.append(stats)


@dataclass(frozen=True)
class _HasError:
    """The method of a response."""

    is_error: bool

    def has_error(self) -> bool:
        return self.is_error


def _priority(sequence: _Sequence) -> float:
    return sequence.request.priority_value


def _insert(ordered: list[_Sequence], sequence: _Sequence) -> None:
    """Put a request behind all whose priority is not lower."""
    is_lower = [_priority(other) < _priority(sequence) for other in ordered]
    ordered.insert(is_lower.index(True) if True in is_lower else len(ordered), sequence)


def implement_executor(stubs: Stubs, *, step_s: float | None = None) -> list[FakeExecutor]:
    """Make the stubs' Executor a FakeExecutor over the engine directory that it is given; return
    the list to which each one that is constructed is added."""
    made: list[FakeExecutor] = []

    def construct(model_path: str, model_type: Any, executor_config: Any) -> FakeExecutor:
        assert model_type is stubs.find(BINDINGS).ModelType.DECODER_ONLY
        config = json.loads(Path(model_path, "config.json").read_text(encoding="utf-8"))
        tokens_per_block = config["build_config"]["plugin_config"]["tokens_per_block"]
        max_tokens = executor_config.kv_cache_config.max_tokens
        executor = FakeExecutor(
            stubs,
            executor_config,
            tokens_per_block=tokens_per_block,
            num_blocks=-(-max_tokens // tokens_per_block),
            step_s=step_s,
        )
        made.append(executor)
        return executor

    stubs.implement(f"{BINDINGS}.Executor", construct)
    stubs.implement(f"{BINDINGS}.Request", RequestArguments)
    return made
