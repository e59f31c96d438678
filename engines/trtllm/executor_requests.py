"""Our requests in the words of TensorRT-LLM's executor, and its responses in ours.

What its sampler means by a parameter is not always what docs/api.md promises. Such a parameter is
refused, not passed on.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from orchestrator.core.errors import RequestRejected
from orchestrator.core.ports import RequestEvent
from orchestrator.core.request import FinishReason, RequestSpec, SamplingParams

MAX_TOP_K = 1024
"""Tokens that the sampling kernels can choose among. They clip a larger `top_k` without an error.
Source: TOP_K_MAX in cpp/tensorrt_llm/layers/topKSamplingLayer.cu."""


def priority_of(weight: float) -> float:
    """Return the executor's priority, from 0 to below 1, of a weight, which is 0 or more.

    It orders requests as their weights do, whatever the classes are, and weight 1 gets the 0.5
    of requests without a priority.
    """
    return weight / (1 + weight)


def cache_salt_of(salt: str) -> int:
    """Return the number that keeps a client's KV blocks apart from those of all others.

    Two clients share one by chance with probability 2^-64.
    """
    return int.from_bytes(blake2b(salt.encode(), digest_size=8).digest())


def make_request(bindings: Any, spec: RequestSpec, *, has_block_reuse: bool) -> Any:
    """Return a `Request` of `tensorrt_llm.bindings.executor`, which is `bindings`.

    Raises:
        RequestRejected: it asks for something that the executor does otherwise, or not at all.
    """
    sampling = spec.sampling
    _check(sampling)
    return bindings.Request(
        list(spec.prompt_token_ids),
        sampling.max_tokens,
        streaming=True,
        sampling_config=_sampling_config(bindings, sampling),
        output_config=bindings.OutputConfig(exclude_input_from_output=True),
        # Not as `end_id`, of which there is but one, and which is left out of the output.
        stop_words=[[token_id] for token_id in sampling.stop_token_ids] or None,
        priority=priority_of(spec.weight),
        cache_salt_id=cache_salt_of(spec.cache_salt) if has_block_reuse else None,
    )


def _check(sampling: SamplingParams) -> None:
    if sampling.num_logprobs is not None:
        raise RequestRejected(
            "logprobs are asked for, TensorRT-LLM's executor reports none of the distribution "
            "before temperature and truncation; leave them out or use a node of another kind",
            field="logprobs",
        )
    if sampling.logit_bias:
        raise RequestRejected(
            "logit_bias is asked for, TensorRT-LLM's executor takes it in another form; leave it "
            "out or use a node of another kind",
            field="logit_bias",
        )
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        if value != 0:
            raise RequestRejected(
                f"{name} is {value}, TensorRT-LLM's executor would count the prompt's tokens "
                "too; leave it out or use a node of another kind",
                field=name,
            )
    if sampling.top_k > MAX_TOP_K:
        raise RequestRejected(
            f"top_k is {sampling.top_k:,}, TensorRT-LLM's executor keeps at most {MAX_TOP_K:,} "
            "tokens; lower it, or say 0 to keep all",
            field="top_k",
        )


def _sampling_config(bindings: Any, sampling: SamplingParams) -> Any:
    # What changes nothing is left out: giving it costs a kernel in every step.
    given: dict[str, Any] = {}
    if sampling.repetition_penalty != 1:
        given["repetition_penalty"] = sampling.repetition_penalty
    if sampling.temperature == 0:
        return bindings.SamplingConfig(top_k=1, **given)
    if sampling.min_p > 0:
        given["min_p"] = sampling.min_p
    # Both, always: with neither, the executor is greedy.
    return bindings.SamplingConfig(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        **given,
    )


def event_of(bindings: Any, response: Any, request_id: str) -> RequestEvent:
    """Return what a `Response` of the executor says of a request."""
    if response.has_error():
        return RequestEvent(
            request_id,
            finish_reason=FinishReason.ERROR,
            error=f"the engine failed: {response.error_msg}",
        )
    result = response.result
    token_ids = tuple(result.output_token_ids[0])  # of the only beam
    if not result.is_final:
        return RequestEvent(request_id, token_ids)
    reason = result.finish_reasons[0]
    reasons = bindings.FinishReason
    if reason in (reasons.END_ID, reasons.STOP_WORDS):
        return RequestEvent(request_id, token_ids, finish_reason=FinishReason.STOP)
    if reason == reasons.LENGTH:
        return RequestEvent(request_id, token_ids, finish_reason=FinishReason.LENGTH)
    return RequestEvent(
        request_id,
        token_ids,
        finish_reason=FinishReason.ERROR,
        error=f"TensorRT-LLM's executor ended the request with {reason.name}",
    )
