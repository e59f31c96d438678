"""Short ways to make what tests need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.core.batch_scheduler import BatchScheduler
from orchestrator.core.kv_transfer import CopyProfile
from orchestrator.core.latency import BatchLatencyModel, LatencyProfile
from orchestrator.core.ports import EngineCapabilities, QueueSummary, SchedulerOutput, StepOutput
from orchestrator.core.request import Request, RequestSpec, SamplingParams
from orchestrator.core.slide_batching import SlideBatchingOptions, SlideBatchingScheduler
from orchestrator.core.slo import Slo


def make_profile(
    *,
    prefill_token_s: float = 0.001,
    decode_token_s: float = 0.001,
    step_constant_s: float = 0.010,
) -> LatencyProfile:
    """One millisecond a token and ten a step, whatever the context."""
    return LatencyProfile(
        prefill_quadratic_s=0.0,
        prefill_context_s=0.0,
        prefill_token_s=prefill_token_s,
        prefill_cached_s=0.0,
        decode_context_s=0.0,
        decode_token_s=decode_token_s,
        mixed_step_s=step_constant_s,
        decode_step_s=step_constant_s,
    )


def make_queue_summary(
    *prefills: tuple[float | None, float, float],
    profile: LatencyProfile | None = None,
    decode_context_tokens: int = 0,
    decode_weight: float = 0.0,
    min_decode_tpot_s: float | None = None,
    latency_budget_s: float | None = None,
) -> QueueSummary:
    """Each prefill is (due in seconds, weight, seconds of work)."""
    return QueueSummary(
        due_in_s=tuple(due_in_s for due_in_s, _, _ in prefills),
        weight=tuple(weight for _, weight, _ in prefills),
        work_s=tuple(work_s for _, _, work_s in prefills),
        num_prefills=(1,) * len(prefills),
        decode_context_tokens=decode_context_tokens,
        decode_weight=decode_weight,
        min_decode_tpot_s=min_decode_tpot_s,
        max_weight=max((weight for _, weight, _ in prefills), default=0.0),
        latency_budget_s=latency_budget_s,
        latency_profile=profile or make_profile(),
    )


def make_copy_profile(
    *, block_s: float = 0.001, contention: float = 2.0, start_s: float = 0.0
) -> CopyProfile:
    """One millisecond a block either way, and twice that when both go at once."""
    return CopyProfile(
        onboard_block_s=block_s,
        offload_block_s=block_s,
        contended_onboard_block_s=contention * block_s,
        contended_offload_block_s=contention * block_s,
        start_s=start_s,
    )


def make_capabilities(
    *,
    num_device_blocks: int = 1000,
    block_size_tokens: int = 16,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 64,
    max_model_len: int = 8192,
    num_host_blocks: int = 0,
    num_layer_groups: int = 4,
    **others: Any,
) -> EngineCapabilities:
    return EngineCapabilities(
        block_size_tokens=block_size_tokens,
        num_device_blocks=num_device_blocks,
        num_host_blocks=num_host_blocks,
        num_layer_groups=num_layer_groups,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        **others,
    )


def make_request(
    request_id: str = "r",
    *,
    num_prompt_tokens: int = 10,
    prompt_token_ids: Sequence[int] | None = None,
    max_tokens: int = 8,
    weight: float = 1.0,
    ttft_s: float = 1.0,
    tpot_s: float = 0.050,
    arrival_s: float = 0.0,
    num_output_tokens: int = 0,
    client_id: str = "",
    cache_salt: str = "",
    stop_token_ids: tuple[int, ...] = (),
    sampling: SamplingParams | None = None,
) -> Request:
    """With `num_output_tokens`, a request that a preemption threw back: nothing computed."""
    request = Request(
        RequestSpec(
            request_id=request_id,
            prompt_token_ids=tuple(
                range(num_prompt_tokens) if prompt_token_ids is None else prompt_token_ids
            ),
            sampling=sampling
            or SamplingParams(
                max_tokens=max_tokens, seed=0, temperature=0.0, stop_token_ids=stop_token_ids
            ),
            priority_class="normal",
            weight=weight,
            slo=Slo(ttft_s=ttft_s, tpot_s=tpot_s),
            client_id=client_id,
            cache_salt=cache_salt,
        ),
        arrival_s=arrival_s,
    )
    for index in range(num_output_tokens):
        request.append_output_token(index, arrival_s)
    return request


def make_scheduler(
    *requests: Request,
    options: SlideBatchingOptions | None = None,
    profile: LatencyProfile | None = None,
    capabilities: EngineCapabilities | None = None,
) -> SlideBatchingScheduler:
    """SlideBatching without a minimum chunk, unless the options say otherwise."""
    scheduler = SlideBatchingScheduler(
        capabilities or make_capabilities(),
        BatchLatencyModel(profile or make_profile()),
        options or SlideBatchingOptions(min_chunk_tokens=0),
    )
    for request in requests:
        scheduler.add_request(request)
    return scheduler


def run_step(
    scheduler: BatchScheduler,
    now_s: float,
    *,
    token_id: int = 7,
    step_s: float | None = None,
    ended_copies: Sequence[int] = (),
) -> tuple[SchedulerOutput, float]:
    """Schedule one step, let a perfect engine compute it, and return the plan and the end.

    All copies of the step end with it, and these of steps before.
    """
    plan = scheduler.schedule(now_s)
    duration_s = plan.predicted_step_s if step_s is None else step_s
    output = StepOutput(
        step_id=plan.step_id,
        new_token_ids={p.request_id: (token_id,) for p in plan.scheduled if p.is_sampled},
        step_s=duration_s,
        completed_transfers=(*ended_copies, *(t.transfer_id for t in plan.transfers)),
    )
    scheduler.update_from_output(plan, output, now_s + duration_s)
    return plan, now_s + duration_s
