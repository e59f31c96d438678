"""What every engine that computes logits does around its model: checks, KV copies, sampling, and
the account of who failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engines.kv_copies import CopyReport
from engines.plan_checks import PlanChecks, check_transfers
from orchestrator.core.errors import EngineLost, EngineStepError
from orchestrator.core.kv_transfer import KVTransfer
from orchestrator.core.ports import (
    EngineCapabilities,
    ScheduledRequest,
    SchedulerOutput,
    StepOutput,
)
from orchestrator.grammars import GrammarCompiler
from orchestrator.logit_adjustment import SamplingFailed
from orchestrator.sampling import Draw, SampledToken, Sampler


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a model computed in one step."""

    sequences: Sequence[ScheduledRequest]
    """Not all of them need to be sampled."""

    logits: torch.Tensor  # (num_sequences, vocab_size), row i is sequence i's


Compute = Callable[[Sequence[ScheduledRequest]], StepLogits]
"""Runs a model on these parts of a checked plan; there is at least one. Whatever it raises
ends the step."""


class StepCopies(Protocol):
    """The KV copies of a step, as `engines.kv_copies.KVCopies` makes them."""

    @property
    def in_flight(self) -> Sequence[KVTransfer]:
        """What was started and not yet reported."""
        ...

    def start(self, transfers: Iterable[KVTransfer]) -> None:
        """Begin a step with these copies."""
        ...

    def hold_compute(self) -> None:
        """Let the computation wait for all copies of this step."""
        ...

    def broken_onboards(self) -> Sequence[KVTransfer]:
        """Return the onboards of this step that failed."""
        ...

    def wait_for_one(self) -> None:
        """Return when there is something to report, or nothing is in flight."""
        ...

    def finish_step(self) -> CopyReport:
        """Return the onboards, and the offloads that have ended by now."""
        ...

    def give_up_step(self, transfers: Iterable[KVTransfer], reason: str) -> None:
        """End a step that failed; the next report tells of these transfers."""
        ...


class StepRunner:
    """Runs steps of one model. One thread may use it at a time."""

    def __init__(
        self,
        capabilities: EngineCapabilities,
        copies: StepCopies,
        *,
        vocab_size: int,
        compute: Compute,
        grammars: GrammarCompiler | None = None,
        draw_on_cpu: Draw | None = None,
    ) -> None:
        """`compute` makes the model's kernels wait for onboarded blocks, unless the plan waits
        for transfers. `grammars` is for an engine whose capabilities have no grammar obstacle,
        `draw_on_cpu` for one that draws tokens in its own way."""
        self._limits, self._copies = capabilities, copies
        self._vocab_size, self._compute_logits = vocab_size, compute
        self._plan_checks = PlanChecks(capabilities)
        self._sampler = Sampler(vocab_size, grammars, draw_on_cpu=draw_on_cpu)
        self._model_s: float | None = None

    def run(self, plan: SchedulerOutput) -> StepOutput:
        """Copy and compute one step; see `core.ports.Engine`.

        A request with a token outside of the vocabulary, whose logits are not numbers or whose
        grammar cannot be followed fails alone: it is in `failed`. Any other fault ends the whole
        step; the next one that does not fail then tells what became of its copies.

        Raises:
            EngineStepError: names every request of the step.
            EngineLost: what `compute` or the copies run on has ended.
        """
        started_s = time.perf_counter()
        self._model_s = None
        self._sampler.forget(plan.finished_ids)
        try:
            self._plan_checks.check(plan)
            check_transfers(plan, self._limits, self._copies.in_flight)
            self._copies.start(plan.transfers)
            failed = self._foreign_tokens(plan.scheduled)
            parts: Sequence[ScheduledRequest] = plan.scheduled
            if failed:
                parts = [part for part in parts if part.request_id not in failed]
            if plan.waits_for_transfers:
                self._copies.hold_compute()
            tokens = self._compute(parts, failed) if parts else {}
            if not plan.scheduled:
                self._copies.wait_for_one()
            copies = self._copies.finish_step()
        except EngineLost:
            raise
        # Of any kind, such as Triton's own: onboards that are not ended here would be reported as
        # whole by the next step, whose requests may share their blocks.
        except Exception as error:
            self._copies.give_up_step(plan.transfers, f"step {plan.step_id} failed: {error}")
            raise EngineStepError(
                f"step {plan.step_id} failed: {error}",
                request_ids=[part.request_id for part in plan.scheduled],
            ) from error
        return StepOutput(
            step_id=plan.step_id,
            new_token_ids={request_id: (t.token_id,) for request_id, t in tokens.items()},
            step_s=time.perf_counter() - started_s,
            model_s=self._model_s,
            logprobs={
                request_id: (token.logprobs,)
                for request_id, token in tokens.items()
                if token.logprobs is not None
            },
            completed_transfers=copies.completed,
            failed_transfers=copies.failed,
            copies=copies.figures,
            failed=failed,
        )

    def _foreign_tokens(self, parts: Sequence[ScheduledRequest]) -> dict[str, str]:
        """Return a message for each request with a token that the model does not know."""
        message = f"the request holds token ids outside of [0, {self._vocab_size})"
        return {part.request_id: message for part in parts if self._is_foreign(part)}

    def _is_foreign(self, part: ScheduledRequest) -> bool:
        token_ids, biases = part.token_ids, part.request.spec.sampling.logit_bias
        if len(token_ids) == 1:  # the many decodes of a step
            smallest = largest = token_ids[0]
        else:
            smallest, largest = min(token_ids), max(token_ids)
        if smallest < 0 or largest >= self._vocab_size:
            return True
        return bool(biases) and not all(0 <= token < self._vocab_size for token, _ in biases)

    @torch.inference_mode()
    def _compute(
        self, parts: Sequence[ScheduledRequest], failed: dict[str, str]
    ) -> dict[str, SampledToken]:
        """Return the new tokens by request id; add to `failed` who got none."""
        self._sampler.prepare(part.request for part in parts)
        started_s = time.perf_counter()
        step = self._compute_logits(parts)
        if step.logits.is_cpu:  # a GPU has only been told
            self._model_s = time.perf_counter() - started_s
        lost = self._without_blocks(parts)
        rows = [
            row
            for row, part in enumerate(step.sequences)
            if part.is_sampled and not (lost and part.request_id in lost)
        ]
        tokens = self._sample(step, rows, failed)
        if step.logits.is_cuda:
            # Not the whole device: offloads go on. There may have been no token to wait for.
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(step.logits.device))
            computed.synchronize()
        return tokens

    def _sample(
        self, step: StepLogits, rows: Sequence[int], failed: dict[str, str]
    ) -> dict[str, SampledToken]:
        """Return new tokens for these rows of the logits; add to `failed` who got none."""
        chosen = step.logits if len(rows) == len(step.sequences) else step.logits[rows]
        requests = [step.sequences[row].request for row in rows]
        while True:
            try:
                tokens = self._sampler.sample(chosen, requests)
            except SamplingFailed as error:
                failed.update(error.reasons)
                good = [i for i, r in enumerate(requests) if r.request_id not in failed]
                chosen, requests = chosen[good], [requests[i] for i in good]
            else:
                return {r.request_id: token for r, token in zip(requests, tokens, strict=True)}

    def _without_blocks(self, parts: Sequence[ScheduledRequest]) -> set[str]:
        """Return the requests that read a block whose onboard failed."""
        broken = self._copies.broken_onboards()
        if not broken:
            return set()
        blocks = {block for transfer in broken for block in transfer.device_block_ids}
        return {transfer.request_id for transfer in broken} | {
            part.request_id for part in parts if not blocks.isdisjoint(part.block_ids)
        }
