"""EXPERIMENTAL: SlideBatching as the scheduler of TensorRT-LLM's PyTorch executor.

Releases after 1.3.0rc20 run no prebuilt engines; their PyTorch executor asks a Python object in
every iteration which requests to compute. This is such an object: it mirrors the executor's
requests in our scheduler, lets that plan the step, and answers in the executor's words. `install`
puts it in place. Nothing of it has run on a real TensorRT-LLM.

What the interface does not give, and what follows:

- A request is known from its activation on, not from its arrival; its deadlines count from then.
- A request says what it is worth by its priority alone: `ServiceClass` gives that a meaning.
- The executor's KV cache manager takes the blocks of a whole prompt with its first chunk, and what
  a paused request loses is computed again. Block reuse is the manager's; the mirror, which does
  not know of it, errs on the side of caution.
- With several GPUs each rank decides for itself, and all must decide the same. The mirror depends
  on the requests and the clock alone, so rank 0's clock is broadcast to all.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.core.errors import EngineError
from orchestrator.core.latency import BatchLatencyModel, BatchShape, LatencyProfile
from orchestrator.core.ports import (
    EngineCapabilities,
    ScheduledRequest,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.core.request import Request, RequestSpec, SamplingParams
from orchestrator.core.slide_batching import SlideBatchingOptions, SlideBatchingScheduler
from orchestrator.core.slo import Slo

_SOME_TOKEN = 0
"""Stands for every token: which ones they are does not matter to a schedule."""


@dataclass(frozen=True, slots=True)
class ServiceClass:
    """What requests of one priority are worth and promised."""

    priority: float
    """As requests carry it, 0 to 1. A request is of the class whose priority is nearest."""

    weight: float
    slo: Slo


@dataclass(frozen=True, slots=True)
class PyTorchSchedulerOptions:
    """What the executor does not know but SlideBatching has to."""

    latency_profile: LatencyProfile
    """Of this model on this machine, as an engine directory's manifest has it."""

    classes: tuple[ServiceClass, ...]
    """At least one."""

    slide_batching: SlideBatchingOptions = field(default_factory=SlideBatchingOptions)

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("classes is empty, it must have at least one service class")


@dataclass(frozen=True, slots=True)
class ExecutorLimits:
    """Limits of the executor that is scheduled for."""

    max_batch_size: int
    max_num_tokens: int
    chunk_unit_tokens: int
    """Every chunk that does not finish its prompt has a multiple of this many tokens."""


@dataclass(frozen=True, slots=True)
class _Dispatched:
    """What the executor was last told to compute."""

    plan: SchedulerOutput
    parts: tuple[ScheduledRequest, ...] = ()
    """Those of the plan's parts that it got, with the chunks that it got."""

    started_s: float = 0.0


class SlideBatchingRequestScheduler:
    """Does what `RequestScheduler` of TensorRT-LLM's PyTorch executor must do."""

    def __init__(
        self,
        kv_cache: Any,
        limits: ExecutorLimits,
        options: PyTorchSchedulerOptions,
        *,
        now_s: Callable[[], float],
    ) -> None:
        """`kv_cache` is the C++ KVCacheManager; `now_s` a clock that shows the same on all ranks.

        Raises:
            EngineError: limits or KV cache are not such that requests can be chunked.
        """
        from tensorrt_llm._torch.pyexecutor.scheduler import SchedulerOutput as ExecutorOutput
        from tensorrt_llm.bindings import LlmRequestState

        if limits.chunk_unit_tokens > limits.max_num_tokens:
            raise EngineError(
                f"a chunk has at least {limits.chunk_unit_tokens} tokens, max_num_tokens is "
                f"{limits.max_num_tokens}; raise it"
            )
        self._kv_cache = kv_cache
        self._limits = limits
        self._classes = options.classes
        self._now_s = now_s
        self._output_type = ExecutorOutput
        self._computable_states = (
            LlmRequestState.CONTEXT_INIT,
            LlmRequestState.GENERATION_IN_PROGRESS,
        )
        stats = kv_cache.get_kv_cache_stats()
        self._block_size_tokens: int = stats.tokens_per_block
        self._num_pool_tokens: int = stats.max_num_blocks * stats.tokens_per_block
        # No chunk that would have to be rounded down to nothing.
        min_chunk_tokens = max(
            options.slide_batching.min_chunk_tokens, limits.chunk_unit_tokens - 1
        )
        self._scheduler = SlideBatchingScheduler(
            EngineCapabilities(
                block_size_tokens=self._block_size_tokens,
                num_device_blocks=stats.max_num_blocks,
                num_host_blocks=0,
                max_num_batched_tokens=limits.max_num_tokens,
                max_num_seqs=limits.max_batch_size,
                max_model_len=self._num_pool_tokens + 1,
                reserves_prompts=True,
            ),
            BatchLatencyModel(options.latency_profile),
            dataclasses.replace(options.slide_batching, min_chunk_tokens=min_chunk_tokens),
        )
        self._mirrored_ids: set[int] = set()
        self._last: _Dispatched | None = None

    def schedule_request(self, active_requests: list[Any], inflight_request_ids: set[int]) -> Any:
        """Return the executor's SchedulerOutput for its next iteration; sets the chunk size of
        every context request in it."""
        now_s = self._now_s()
        self._account({request.request_id: request for request in active_requests}, now_s)
        # What is about to end has nothing left to compute, but still holds its blocks.
        live = {r.request_id: r for r in active_requests if r.state in self._computable_states}
        self._mirror(live, now_s)
        plan = self._scheduler.schedule(now_s)
        candidates = [
            (part, live[int(part.request_id)])
            for part in plan.scheduled
            if int(part.request_id) not in inflight_request_ids
        ]
        preempted = (live[int(request_id)] for request_id in plan.preempted_ids)
        paused = [request for request in preempted if _has_begun(request)]
        if plan.preempted_ids or len(live) < len(active_requests):
            candidates = self._with_blocks(candidates)
        context, generation, parts = [], [], []
        for part, request in candidates:
            if request.is_context_init_state:
                request.context_chunk_size = self._chunk_tokens(part, request)
                parts.append(_with_tokens(part, request.context_chunk_size))
                context.append(request)
            else:
                parts.append(part)
                generation.append(request)
        self._last = _Dispatched(plan, tuple(parts), now_s)
        # The executor reads logits by position: chunks that make none come first.
        context.sort(key=lambda request: request.is_last_context_chunk)
        return self._output_type(
            context_requests=context,
            generation_requests=generation,
            paused_requests=paused,
            fitting_disagg_gen_init_requests=[],
            num_fitting_requests=len(parts),
        )

    def can_schedule(self, requests: list[Any]) -> bool:
        """Return whether there are KV blocks for the next step of all these requests."""
        num_needed = sum(self._num_needed_blocks(request) for request in requests)
        return num_needed <= int(self._kv_cache.get_kv_cache_stats().free_num_blocks)

    # --- what the executor has done ---

    def _account(self, live: Mapping[int, Any], now_s: float) -> None:
        """Tell the scheduler what has become of the last plan."""
        if self._last is None:
            return
        plan, done = self._last.plan, []
        for part in self._last.parts:
            request = live.get(int(part.request_id))
            if request is not None and (num_new_tokens := _progress(request, part)) > 0:
                done.append(_with_tokens(part, num_new_tokens))
        # Without a survivor, some of the time since then may have been idle.
        step_s = now_s - self._last.started_s if done else 0.0
        output = StepOutput(
            step_id=plan.step_id,
            new_token_ids={part.request_id: (_SOME_TOKEN,) for part in done if part.is_sampled},
            step_s=step_s,
        )
        shape = sum((_shape_of(part) for part in self._last.parts), BatchShape())
        plan = dataclasses.replace(plan, scheduled=tuple(done), shape=shape)
        self._scheduler.update_from_output(plan, output, now_s)

    def _mirror(self, live: Mapping[int, Any], now_s: float) -> None:
        """Take in new requests and drop those that have ended, in the executor's order."""
        for request_id in sorted(self._mirrored_ids - live.keys()):
            self._scheduler.abort_request(str(request_id))
            self._mirrored_ids.discard(request_id)
        for request_id, request in live.items():
            if request_id not in self._mirrored_ids:
                self._scheduler.add_request(Request(self._spec(request), arrival_s=now_s))
                self._mirrored_ids.add(request_id)

    def _spec(self, request: Any) -> RequestSpec:
        if not request.is_context_init_state or request.num_draft_tokens:
            raise EngineError(
                f"request {request.request_id} is in state {request.state.name} with "
                f"{request.num_draft_tokens} draft tokens; disaggregated serving and speculative "
                "decoding cannot be scheduled by SlideBatching"
            )
        nearest = min(self._classes, key=lambda c: abs(c.priority - request.priority()))
        return RequestSpec(
            request_id=str(request.request_id),
            prompt_token_ids=(_SOME_TOKEN,) * request.prompt_len,
            # The executor knows when a request ends; the mirror must not end it before.
            sampling=SamplingParams(
                max_tokens=max(1, self._num_pool_tokens + 1 - request.prompt_len), seed=0
            ),
            priority_class=str(nearest.priority),
            weight=nearest.weight,
            slo=nearest.slo,
        )

    # --- what the executor shall do ---

    def _with_blocks(
        self, candidates: Sequence[tuple[ScheduledRequest, Any]]
    ) -> list[tuple[ScheduledRequest, Any]]:
        """Return the candidates whose KV blocks are there for certain.

        The mirror counts on the blocks of its victims, and of requests about to end. The manager
        has neither back yet, and does not say how many it will get, for blocks may be shared. So
        nobody gets them before the next step. Without such requests the mirror never counts on
        more than there is: it knows of every block but not of sharing.
        """
        num_free: int = self._kv_cache.get_kv_cache_stats().free_num_blocks
        fitting = []
        for part, request in candidates:
            num_needed = self._num_needed_blocks(request)
            if num_needed <= num_free:
                num_free -= num_needed
                fitting.append((part, request))
        return fitting

    def _chunk_tokens(self, part: ScheduledRequest, request: Any) -> int:
        remaining: int = request.context_remaining_length
        unit = self._limits.chunk_unit_tokens
        if part.num_new_tokens >= remaining:
            return remaining
        # Less than a unit is planned only for a request that has the step to itself.
        return min(remaining, max(unit, part.num_new_tokens // unit * unit))

    def _num_needed_blocks(self, request: Any) -> int:
        """Return how many blocks the manager takes at most if a request is computed next."""
        if request.is_context_init_state:
            return self._num_blocks(request.prompt_len) if request.is_first_context_chunk else 0
        # The token that is fed next is the last one, or, where steps overlap, one not known yet.
        return int(request.get_num_tokens(0) % self._block_size_tokens <= 1)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size_tokens)


def _has_begun(request: Any) -> bool:
    """Return whether a request has KV blocks, so that it can be paused."""
    return not (request.is_context_init_state and request.is_first_context_chunk)


def _progress(request: Any, part: ScheduledRequest) -> int:
    """Return by how many computed tokens a request has come further; more than it was told to
    compute if the manager knew the KV of a part of its prompt."""
    if request.is_context_init_state:
        return int(request.context_current_position) - part.num_computed_tokens
    # Its prompt is done, or it was generating already. A new token may not be known yet: an
    # executor that overlaps steps asks for the next plan before it has looked.
    return part.request.num_tokens - part.num_computed_tokens


def _with_tokens(part: ScheduledRequest, num_new_tokens: int) -> ScheduledRequest:
    return dataclasses.replace(part, num_new_tokens=num_new_tokens)


def _shape_of(part: ScheduledRequest) -> BatchShape:
    if part.num_new_tokens == 1 and part.request.is_decoding:
        return BatchShape.of_decode(part.num_computed_tokens)
    return BatchShape.of_prefill(part.num_new_tokens, part.num_computed_tokens)


def install(options: PyTorchSchedulerOptions) -> None:
    """Let every PyTorch executor that this process creates from now on schedule by SlideBatching.

    TensorRT-LLM has no place for that. Of the ways around, this depends on least: the function
    that makes an executor, and the executor's attribute `scheduler`, which its loop reads in each
    iteration. It must run in the worker processes, before the LLM is created.

    Raises:
        EngineError: here, or when an executor is created: it has features that the mirror does
            not know, such as pipeline parallelism or speculative decoding.
    """
    from tensorrt_llm._torch.pyexecutor import _util, py_executor_creator
    from tensorrt_llm._torch.pyexecutor.scheduler import RequestScheduler

    # Its instances are RequestSchedulers, though this module can be read without the class.
    RequestScheduler.register(SlideBatchingRequestScheduler)
    original = _util.create_py_executor_instance

    def create_py_executor_instance(**arguments: Any) -> Any:
        _check_supported(arguments)
        executor = original(**arguments | {"start_worker": False})
        executor.scheduler = _make_scheduler(arguments, options)
        if arguments["start_worker"]:
            executor.start_worker()
        return executor

    for module in (_util, py_executor_creator):
        module.create_py_executor_instance = create_py_executor_instance


def _check_supported(arguments: Mapping[str, Any]) -> None:
    mapping = arguments["mapping"]
    problems = {
        "pipeline parallelism (pp_size)": mapping.pp_size > 1,
        "speculative decoding": arguments["drafter"] is not None,
        "LoRA": arguments.get("lora_config") is not None,
        "beam search (max_beam_width)": (arguments.get("max_beam_width") or 1) > 1,
        "prompts in one piece (enable_chunked_prefill: false)": (
            arguments["ctx_chunk_config"] is None
        ),
    }
    for what, is_wanted in problems.items():
        if is_wanted:
            raise EngineError(
                f"SlideBatching cannot schedule TensorRT-LLM's PyTorch executor with {what}; turn "
                "it off, or do without `install`"
            )
    for name in ("max_batch_size", "max_num_tokens"):
        if arguments.get(name) is None:
            raise EngineError(f"{name} is not set; SlideBatching needs to know it")


def _make_scheduler(
    arguments: Mapping[str, Any], options: PyTorchSchedulerOptions
) -> SlideBatchingRequestScheduler:
    """Return the scheduler of an executor that was made with these arguments."""
    from tensorrt_llm._torch.pyexecutor.resource_manager import KVCacheManager, ResourceManagerType

    manager = arguments["resources"].get(ResourceManagerType.KV_CACHE_MANAGER)
    if not isinstance(manager, KVCacheManager):
        raise EngineError(
            f"the KV cache is managed by {type(manager).__name__}; SlideBatching can schedule over "
            "KVCacheManager alone, so leave use_kv_cache_manager_v2 off"
        )
    _, chunk_unit_tokens = arguments["ctx_chunk_config"]
    dist = arguments["dist"]
    is_alone = arguments["mapping"].world_size == 1
    return SlideBatchingRequestScheduler(
        manager.impl,
        ExecutorLimits(
            max_batch_size=arguments["max_batch_size"],
            max_num_tokens=arguments["max_num_tokens"],
            chunk_unit_tokens=chunk_unit_tokens,
        ),
        options,
        now_s=time.monotonic if is_alone else lambda: dist.broadcast(time.monotonic(), root=0),
    )
