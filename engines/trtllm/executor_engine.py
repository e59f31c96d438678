"""Prebuilt TensorRT-LLM engines under TensorRT-LLM's own scheduler, its C++ Executor.

This is what SlideBatching is compared with, on the same engine directory. The executor batches in
a thread of its own and cannot be stepped: it takes priorities when requests are handed over,
pauses the lowest and youngest when KV blocks run short, computes what they lost again, and knows
nothing of deadlines. Blocks that nobody uses move to the host and back if it has memory for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self

from engines.trtllm.engine_config import TrtLlmEngineConfig, check_limits, read_engine_config
from engines.trtllm.engine_rules import SUPPORTED_VERSION
from engines.trtllm.executor_requests import event_of, make_request
from engines.trtllm.installation import check_installation
from engines.trtllm.rank_worker import kv_block_bytes
from orchestrator.core.errors import EngineError, RequestRejected
from orchestrator.core.ports import EngineCapabilities, EngineIteration, RequestEvent
from orchestrator.core.request import RequestSpec, SamplingParams
from orchestrator.core.slo import Slo

CapacityPolicy = Literal["max-utilization", "guaranteed-no-evict"]

_POLL_S = 0.01
"""Pause between two looks at what the executor has to say while it starts."""


@dataclass(frozen=True, slots=True)
class TrtLlmExecutorOptions:
    """How an engine directory is run. Memory is per GPU."""

    device: Literal["cpu", "cuda"]
    """The CPU is for a stand-in of TensorRT-LLM in tests."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    num_device_blocks: int | None = None
    """KV blocks; None takes `device_memory_fraction` of the memory that is free."""

    device_memory_fraction: float = 0.9
    num_host_blocks: int = 0
    """For blocks that nobody on the device uses, in pinned main memory."""

    capacity_policy: CapacityPolicy = "max-utilization"
    block_reuse: bool = True
    """Requests of one client share the KV of equal beginnings. Also what makes host blocks of
    use."""

    start_timeout_s: float = 300.0
    """The first request must have ended after this time."""


class TrtLlmExecutorEngine:
    """Implements `core.ports.RequestEngine` over the Executor of the TensorRT-LLM bindings."""

    def __init__(
        self, executor: Any, bindings: Any, capabilities: EngineCapabilities, *, block_reuse: bool
    ) -> None:
        """`executor` is an Executor of `bindings` that has no requests."""
        self._executor = executor
        self._bindings = bindings
        self._capabilities = capabilities
        self._block_reuse = block_reuse
        self._executor_ids: dict[str, int] = {}
        self._request_ids: dict[int, str] = {}
        """The same, by the executor's ids. Requests that were cancelled are in neither."""

    @classmethod
    def load(cls, engine_dir: Path, options: TrtLlmExecutorOptions) -> Self:
        """Return the engine of a directory, after it has answered one request.

        Raises:
            EngineDirectoryError: the directory cannot be served.
            ConfigError: it cannot be served with these limits.
            EngineError: TensorRT-LLM is not installed, is another release, or cannot run it.
        """
        config = read_engine_config(engine_dir)
        check_limits(
            config,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
        )
        check_installation(options.device)
        from tensorrt_llm.bindings import executor as bindings

        try:
            executor = bindings.Executor(
                str(engine_dir),
                bindings.ModelType.DECODER_ONLY,
                _executor_config(bindings, config, options),
            )
            num_device_blocks = _num_blocks_after_first_request(executor, bindings, options)
        except RuntimeError as error:
            raise EngineError(f"TensorRT-LLM cannot run {engine_dir}: {error}") from error
        except TypeError as error:  # what the bindings raise for a parameter they do not have
            raise EngineError(
                f"TensorRT-LLM takes other parameters than its sources say: {error}; "
                "`make trtllm-acceptance` lists all such differences"
            ) from error
        capabilities = EngineCapabilities(
            block_size_tokens=config.tokens_per_block,
            num_device_blocks=num_device_blocks,
            num_host_blocks=options.num_host_blocks,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
            grammar_obstacle="TensorRT-LLM's executor draws its tokens by itself",
        )
        return cls(executor, bindings, capabilities, block_reuse=options.block_reuse)

    @property
    def capabilities(self) -> EngineCapabilities:
        """Limits of one step are the executor's to keep; those of a request are ours to check."""
        return self._capabilities

    def start(self, spec: RequestSpec) -> None:
        """Put a request into the executor's queue. See `core.ports.RequestEngine`."""
        try:
            request = make_request(self._bindings, spec, has_block_reuse=self._block_reuse)
            executor_id = self._executor.enqueue_request(request)
        except (RuntimeError, ValueError) as error:
            if self._executor.can_enqueue_requests():
                raise RequestRejected(f"TensorRT-LLM refuses the request: {error}") from error
            raise EngineError(f"TensorRT-LLM's executor has stopped: {error}") from error
        self._executor_ids[spec.request_id] = executor_id
        self._request_ids[executor_id] = spec.request_id

    def cancel(self, request_id: str) -> None:
        """End a request that has not ended. See `core.ports.RequestEngine`."""
        executor_id = self._executor_ids.pop(request_id)
        del self._request_ids[executor_id]
        with _as_engine_errors():
            self._executor.cancel_request(executor_id)

    def collect(self, timeout_s: float) -> list[RequestEvent]:
        """Return the executor's responses. See `core.ports.RequestEngine`."""
        with _as_engine_errors():
            responses = self._executor.await_responses(timeout=timedelta(seconds=timeout_s))
        events = []
        for response in responses:
            request_id = self._request_ids.get(response.request_id)
            if request_id is None:
                continue  # cancelled; this says that it has stopped
            event = event_of(self._bindings, response, request_id)
            if event.finish_reason is not None:
                del self._request_ids[self._executor_ids.pop(request_id)]
            events.append(event)
        return events

    def take_iterations(self) -> list[EngineIteration]:
        """Return what the executor tells of its steps. See `core.ports.RequestEngine`."""
        with _as_engine_errors():
            return [_iteration(stats) for stats in self._executor.get_latest_iteration_stats()]

    def close(self) -> None:
        """Stop the executor's threads and release its memory."""
        self._executor.shutdown()


@contextmanager
def _as_engine_errors() -> Iterator[None]:
    """Raise as EngineError what the bindings raise, RuntimeError, once their executor is broken."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"TensorRT-LLM's executor has stopped: {error}") from error


def _executor_config(
    bindings: Any, config: TrtLlmEngineConfig, options: TrtLlmExecutorOptions
) -> Any:
    policies = bindings.CapacitySchedulerPolicy
    policy = {
        "max-utilization": policies.MAX_UTILIZATION,
        "guaranteed-no-evict": policies.GUARANTEED_NO_EVICT,
    }[options.capacity_policy]
    if options.num_device_blocks is None:
        memory = {"free_gpu_memory_fraction": options.device_memory_fraction}
    else:
        memory = {"max_tokens": options.num_device_blocks * config.tokens_per_block}
    return bindings.ExecutorConfig(
        max_beam_width=1,
        scheduler_config=bindings.SchedulerConfig(capacity_scheduler_policy=policy),
        kv_cache_config=bindings.KvCacheConfig(
            enable_block_reuse=options.block_reuse,
            host_cache_size=options.num_host_blocks * kv_block_bytes(config),
            **memory,
        ),
        enable_chunked_context=True,
        max_batch_size=options.max_num_seqs,
        max_num_tokens=options.max_num_batched_tokens,
        parallel_config=_parallel_config(bindings) if config.tp_size > 1 else None,
    )


def _parallel_config(bindings: Any) -> Any:
    """Return the configuration in which the executor starts one process per GPU itself."""
    import tensorrt_llm

    worker = Path(tensorrt_llm.__file__).parent / "bin" / "executorWorker"
    if not worker.is_file():
        raise EngineError(
            f"{worker}: is missing, the program that runs an engine of several GPUs; reinstall "
            f"tensorrt-llm=={SUPPORTED_VERSION}"
        )
    return bindings.ParallelConfig(
        communication_mode=bindings.CommunicationMode.ORCHESTRATOR,
        orchestrator_config=bindings.OrchestratorConfig(
            is_orchestrator=True, worker_executable_path=str(worker)
        ),
    )


def _num_blocks_after_first_request(
    executor: Any, bindings: Any, options: TrtLlmExecutorOptions
) -> int:
    """Return how many KV blocks the executor has. Only its steps tell that, so it has to make one;
    which also proves that it can."""
    first = RequestSpec(
        request_id="first",
        prompt_token_ids=(0,),
        sampling=SamplingParams(max_tokens=1, seed=0, temperature=0.0),
        priority_class="",
        weight=1.0,
        slo=Slo(ttft_s=options.start_timeout_s, tpot_s=options.start_timeout_s),
    )
    executor.enqueue_request(make_request(bindings, first, has_block_reuse=options.block_reuse))
    deadline_s = time.monotonic() + options.start_timeout_s
    has_ended, num_blocks = False, None
    while not has_ended or num_blocks is None:
        if time.monotonic() > deadline_s:
            missing = "say how many KV blocks it has" if has_ended else "answer its first request"
            raise EngineError(
                f"TensorRT-LLM's executor did not {missing} in {options.start_timeout_s:.0f} s"
            )
        for response in executor.await_responses(timeout=timedelta(seconds=_POLL_S)):
            event = event_of(bindings, response, first.request_id)
            if event.error is not None:
                raise EngineError(f"the first request failed: {event.error}")
            has_ended = event.finish_reason is not None
        for stats in executor.get_latest_iteration_stats():
            num_blocks = stats.kv_cache_stats.max_num_blocks
    return int(num_blocks)


def _iteration(stats: Any) -> EngineIteration:
    batch = stats.inflight_batching_stats
    return EngineIteration(
        step_id=stats.iter,
        step_s=stats.iter_latency_ms / 1000,
        num_scheduled=batch.num_scheduled_requests,
        num_prefill_tokens=batch.num_ctx_tokens,
        num_decode_tokens=batch.num_gen_requests,
        num_preempted=batch.num_paused_requests,
        num_running=stats.num_active_requests - batch.num_paused_requests,
        num_free_device_blocks=stats.kv_cache_stats.free_num_blocks,
    )
