"""An engine without a model for virtual time: tokens are fixed, durations come from a formula."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engines.host_link import HostLink
from orchestrator.core.kv_transfer import TransferDirection
from orchestrator.core.latency import BatchLatencyModel, BatchShape
from orchestrator.core.ports import CopyFigures, EngineCapabilities, SchedulerOutput, StepOutput

STOP_TOKEN_ID = 0
"""The last token of a request whose output length is known; a stop token of its request."""

TEXT_TOKEN_ID = 1
"""Every other token."""

_STOP = (STOP_TOKEN_ID,)
_TEXT = (TEXT_TOKEN_ID,)
_NUM_NOISE_DRAWS = 4096
"""Drawn at once: one draw costs as much as pricing a small step."""


@dataclass(frozen=True, slots=True)
class StepTimeError:
    """How the engine's true durations differ from its latency model."""

    bias: float = 1.0
    """Factor on every step; 1.1 is an engine 10 % slower than its profile says."""

    noise: float = 0.0
    """Standard deviation of the logarithm of a further random factor, whose mean is 1."""

    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.bias > 0 and math.isfinite(self.bias)):
            raise ValueError(f"bias is {self.bias}, it must be above 0 and finite")
        if not (self.noise >= 0 and math.isfinite(self.noise)):
            raise ValueError(f"noise is {self.noise}, it must be at least 0 and finite")


class SimulatedEngine:
    """Implements `core.ports.Engine`. Never waits: `step_s` says how long a step would take.

    Request `id` gets `output_lengths[id]` tokens, the last of them STOP_TOKEN_ID, which its
    sampling parameters must list as a stop token; a request not listed never stops by itself.
    """

    def __init__(
        self,
        capabilities: EngineCapabilities,
        model: BatchLatencyModel,
        *,
        output_lengths: Mapping[str, int],
        error: StepTimeError = StepTimeError(),
        link: HostLink | None = None,
        block_bytes: int = 0,
    ) -> None:
        """Without a `link`, plans hold no copies. `block_bytes` is one KV block's size."""
        self._capabilities = capabilities
        self._model = model
        self._output_lengths = output_lengths
        self._error = error
        self._link = link
        self._block_bytes = block_bytes
        self._random = np.random.default_rng(error.seed)
        self._factors: list[float] = []
        self.num_steps = 0
        self.num_computed_tokens = 0
        """Tokens put through the model so far, recomputed ones again."""

        self.busy_s = 0.0
        """Sum of all durations."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """Limits that the schedulers must keep to."""
        return self._capabilities

    def step(self, plan: SchedulerOutput) -> StepOutput:
        """Return the tokens of a step and how long it takes; computes nothing."""
        new_token_ids: dict[str, tuple[int, ...]] = {}
        output_lengths = self._output_lengths
        num_prefills = prefill_tokens = squared = times_context = prefill_context = 0
        num_decodes = decode_context = 0
        # The innermost loop of a simulation: one pass, no properties, no objects per part.
        for part in plan.scheduled:
            request = part.request
            num_new, num_cached = part.num_new_tokens, part.num_computed_tokens
            num_outputs = len(request.output_token_ids)
            if num_new == 1 and num_outputs:
                num_decodes += 1
                decode_context += num_cached
            else:
                num_prefills += 1
                prefill_tokens += num_new
                squared += num_new * num_new
                times_context += num_new * num_cached
                prefill_context += num_cached
            if num_cached + num_new == len(request.all_token_ids):
                request_id = request.spec.request_id
                is_last = num_outputs + 1 == output_lengths.get(request_id)
                new_token_ids[request_id] = _STOP if is_last else _TEXT
        shape = BatchShape(
            num_prefills=num_prefills,
            prefill_tokens=prefill_tokens,
            prefill_tokens_squared=squared,
            prefill_tokens_times_context=times_context,
            prefill_context=prefill_context,
            num_decodes=num_decodes,
            decode_context=decode_context,
        )
        step_s = self._model.predict_s(shape) * self._next_factor()
        self.num_steps += 1
        self.num_computed_tokens += prefill_tokens + num_decodes
        if self._link is not None and (plan.transfers or self._link.has_copies):
            return self._step_with_copies(self._link, plan, new_token_ids, step_s)
        self.busy_s += step_s
        return StepOutput(plan.step_id, new_token_ids, step_s)

    def _step_with_copies(
        self,
        link: HostLink,
        plan: SchedulerOutput,
        new_token_ids: dict[str, tuple[int, ...]],
        compute_s: float,
    ) -> StepOutput:
        """Let copies run beside a step. The link's time passes while steps run."""
        now_s = self.busy_s
        link.start(plan.transfers, now_s)
        onboards = [t for t in plan.transfers if t.direction is TransferDirection.ONBOARD]
        if plan.waits_for_transfers:
            end_s = max(now_s, link.end_s(plan.transfers)) + compute_s
        else:
            num_groups = self._capabilities.num_layer_groups
            end_s = link.compute_end_s(onboards, now_s, compute_s, num_groups=num_groups)
        end_s = max(end_s, link.end_s(onboards))
        if not plan.scheduled and not onboards and link.has_copies:
            end_s = max(end_s, link.next_end_s)
        ended, copy_s = link.pop_ended(end_s)
        self.busy_s = end_s
        num_onboarded = sum(
            len(t.device_block_ids) for t in ended if t.direction is TransferDirection.ONBOARD
        )
        num_offloaded = sum(len(t.device_block_ids) for t in ended) - num_onboarded
        return StepOutput(
            plan.step_id,
            new_token_ids,
            end_s - now_s,
            completed_transfers=tuple(t.transfer_id for t in ended),
            copies=CopyFigures(
                offloaded_bytes=num_offloaded * self._block_bytes,
                onboarded_bytes=num_onboarded * self._block_bytes,
                copy_s=copy_s,
                exposed_s=end_s - now_s - compute_s,
            ),
        )

    def close(self) -> None:
        """Nothing to release."""

    def _next_factor(self) -> float:
        if self._error.noise == 0:
            return self._error.bias
        if not self._factors:
            noise = self._error.noise
            # A log-normal factor exp(x) has mean 1 if x has mean -noise^2 / 2.
            draws = self._random.normal(-noise * noise / 2, noise, _NUM_NOISE_DRAWS)
            self._factors = (self._error.bias * np.exp(draws)).tolist()
        return self._factors.pop()
