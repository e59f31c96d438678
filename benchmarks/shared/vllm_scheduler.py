"""vLLM's own v1 scheduler behind this project's `Scheduler` protocol, for comparisons.

Nothing of it is imitated: vLLM decides order, chunks, admission and preemption over its own KV
cache manager. This module hands it requests and sampled tokens, and translates its decisions.
Facts are those of vLLM 0.32.0.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from pathlib import Path

import torch
from vllm import SamplingParams as VllmSamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.v1.core.sched.scheduler import Scheduler as VllmV1Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request as VllmRequest
from vllm.v1.structured_output import StructuredOutputManager

from orchestrator.core.latency import LatencyProfile
from orchestrator.core.latency_correction import StepErrors
from orchestrator.core.ports import (
    EngineCapabilities,
    QueueSummary,
    RequestEvent,
    ScheduledRequest,
    ScheduleReasons,
    SchedulerLoad,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.core.request import FinishReason, Request

# The scheduler reads limits from a model's configuration, never its size.
_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}

_UNPRICED = LatencyProfile(0.0, 0.0, math.ulp(0.0), 0.0, 0.0, 0.0, 0.0, 0.0)
"""As good as nothing: a profile may not price prompts at 0."""


class VllmScheduler:
    """Implements `core.ports.Scheduler` over vLLM's; chunked prefill, no prefix caching."""

    def __init__(self, capabilities: EngineCapabilities, *, policy: str) -> None:
        """`policy` is vLLM's: `fcfs` or `priority`, where the greater weight goes first."""
        self._scheduler = _make_scheduler(capabilities, policy)
        self._capabilities = capabilities
        self._requests: dict[str, Request] = {}
        self._vllm_output: object = None
        self._next_step_id = 0
        self.num_steps = 0
        self.scheduler_s = 0.0
        """Time spent inside vLLM's `schedule` and `update_from_output`."""

    def add_request(self, request: Request) -> None:
        """Hand a request to vLLM."""
        sampling = request.spec.sampling
        self._requests[request.request_id] = request
        self._scheduler.add_request(
            VllmRequest(
                request_id=request.request_id,
                prompt_token_ids=list(request.spec.prompt_token_ids),
                sampling_params=VllmSamplingParams(
                    max_tokens=sampling.max_tokens, stop_token_ids=list(sampling.stop_token_ids)
                ),
                pooling_params=None,
                arrival_time=request.arrival_s,
                # Lower goes first; integers, so a weight counts in thousandths.
                priority=-round(1000 * request.spec.weight),
            )
        )

    def abort_request(self, request_id: str) -> RequestEvent | None:
        """Not needed by a replay.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"cannot abort {request_id}: a replay never does")

    def schedule(self, now_s: float) -> SchedulerOutput:
        """Let vLLM plan a step."""
        started_s = time.perf_counter()
        output = self._scheduler.schedule()
        self.scheduler_s += time.perf_counter() - started_s
        self.num_steps += 1
        self._vllm_output = output
        scheduled = []
        for request_id, num_new_tokens in output.num_scheduled_tokens.items():
            # vLLM counts what it has just planned as computed.
            num_computed = self._scheduler.requests[request_id].num_computed_tokens
            request = self._requests[request_id]
            request.num_computed_tokens = num_computed - num_new_tokens
            scheduled.append(
                ScheduledRequest(request, request.num_computed_tokens, num_new_tokens, ())
            )
        preempted_ids = tuple(sorted(output.preempted_req_ids or ()))
        for request_id in preempted_ids:
            self._requests[request_id].num_computed_tokens = 0
        plan = SchedulerOutput(
            step_id=self._next_step_id,
            scheduled=tuple(scheduled),
            preempted_ids=preempted_ids,
            finished_ids=(),
            transfers=(),
            predicted_step_s=0.0,
            reasons=ScheduleReasons(),
        )
        self._next_step_id += 1
        return plan

    def update_from_output(
        self, plan: SchedulerOutput, output: StepOutput, now_s: float
    ) -> list[RequestEvent]:
        """Give vLLM the step's tokens and translate its news."""
        request_ids = [part.request_id for part in plan.scheduled]
        result = ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={name: index for index, name in enumerate(request_ids)},
            sampled_token_ids=[list(output.new_token_ids.get(name, ())) for name in request_ids],
        )
        started_s = time.perf_counter()
        outputs = self._scheduler.update_from_output(self._vllm_output, result)
        self.scheduler_s += time.perf_counter() - started_s
        for part in plan.scheduled:
            part.request.num_computed_tokens += part.num_new_tokens
        events = []
        for news in (news for of_client in outputs.values() for news in of_client.outputs):
            request = self._requests[news.request_id]
            for token_id in news.new_token_ids:
                request.append_output_token(token_id, now_s)
            reason = None if news.finish_reason is None else FinishReason(str(news.finish_reason))
            events.append(
                RequestEvent(news.request_id, tuple(news.new_token_ids), finish_reason=reason)
            )
            if reason is not None:
                del self._requests[news.request_id]
        return events

    def load(self) -> SchedulerLoad:
        """Return what vLLM holds."""
        requests = self._requests.values()
        num_running = len(self._scheduler.running)
        num_blocks = self._capabilities.num_device_blocks
        usage = self._scheduler.kv_cache_manager.usage
        return SchedulerLoad(
            num_waiting=len(self._requests) - num_running,
            num_running=num_running,
            num_decoding=sum(r.is_decoding for r in requests),
            num_queued_prompt_tokens=sum(
                r.num_uncomputed_tokens for r in requests if not r.is_decoding
            ),
            num_free_device_blocks=round((1 - usage) * num_blocks),
            num_device_blocks=num_blocks,
        )

    def queue_summary(self, now_s: float) -> QueueSummary:
        """Return what vLLM's requests are due and weigh; it prices no work and has no budget."""
        prefills = sorted(
            (r.arrival_s + r.spec.slo.ttft_s - now_s, r.spec.weight)
            for r in self._requests.values()
            if not r.is_decoding
        )
        decodes = [r for r in self._requests.values() if r.is_decoding]
        tpot_s = min((r.spec.slo.tpot_s for r in decodes), default=math.inf)
        return QueueSummary(
            due_in_s=tuple(due_s if math.isfinite(due_s) else None for due_s, _ in prefills),
            weight=tuple(weight for _, weight in prefills),
            work_s=(0.0,) * len(prefills),
            num_prefills=(1,) * len(prefills),
            decode_context_tokens=sum(r.num_computed_tokens for r in decodes),
            decode_weight=sum(r.spec.weight for r in decodes),
            min_decode_tpot_s=tpot_s if math.isfinite(tpot_s) else None,
            max_weight=max((r.spec.weight for r in self._requests.values()), default=0.0),
            latency_budget_s=None,
            latency_profile=_UNPRICED,
        )

    def step_errors(self) -> tuple[StepErrors, ...]:
        """Return nothing: vLLM predicts no durations."""
        return ()

    @property
    def has_requests(self) -> bool:
        """True while any request has not ended."""
        return bool(self._requests)


def _make_scheduler(capabilities: EngineCapabilities, policy: str) -> VllmV1Scheduler:
    logging.getLogger("vllm").setLevel(logging.ERROR)
    # vLLM keeps one block for itself.
    num_blocks = capabilities.num_device_blocks + 1
    block_size = capabilities.block_size_tokens
    with tempfile.TemporaryDirectory() as model_dir:
        description = {**_MODEL, "max_position_embeddings": capabilities.max_model_len}
        (Path(model_dir) / "config.json").write_text(json.dumps(description))
        model = ModelConfig(
            model=model_dir,
            skip_tokenizer_init=True,
            max_model_len=capabilities.max_model_len,
            dtype="bfloat16",
        )
    cache = CacheConfig(block_size=block_size, enable_prefix_caching=False)
    cache.num_gpu_blocks = num_blocks
    config = VllmConfig(
        model_config=model,
        scheduler_config=SchedulerConfig(
            max_model_len=capabilities.max_model_len,
            is_encoder_decoder=False,
            max_num_batched_tokens=capabilities.max_num_batched_tokens,
            max_num_seqs=capabilities.max_num_seqs,
            enable_chunked_prefill=True,
            policy=policy,
            async_scheduling=False,
        ),
        cache_config=cache,
        device_config=DeviceConfig("cpu"),
    )
    attention = FullAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.bfloat16
    )
    return VllmV1Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], attention)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
        log_stats=False,
    )
